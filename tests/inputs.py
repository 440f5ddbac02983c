"""Makes arguments for a forward of the model, for tests and benchmarks."""
import torch


def example_inputs(config, B=1, T=4, h=8, w=8, L=8):
    """Returns random arguments for a forward, as keywords; config: an STDiTConfig."""
    args = {"x": torch.randn(B, config.in_channels, T, h, w), "t": torch.full((B,), 500),
            "y": torch.randn(B, L, config.caption_channels)}
    for name, value in {"height": 8 * h, "width": 8 * w, "num_frames": T, "ar": w / h, "fps": 8}.items():
        args[name] = torch.full((B,), float(value))
    return args
