"""Checks model.py against the released ST-DiT-2: golden/a_*, f_* hold what Open-Sora 1.1.0 computes.

The a_* cases share two state dicts of random weights, a_weights_*; a_stdit2_<case> holds the arguments and results.
"""
import argparse
import json
import pickle
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kernels
import model as stdit
from configs import flops
from model import TINY, XL_2, STDiT, STDiTConfig, from_pixart, from_upstream, is_pixart, read_weights
from test_kernels import in_threads, use_gpu_ops

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
CASES = ["i_nomask", "i_textmask_none", "ii_xmask", "iv_image", "iv_image_xmask", "vi_sq512_noqknorm"]
SMALL = replace(TINY, depth=2, hidden_size=48, num_heads=4, in_channels=4, caption_channels=8, model_max_length=6)


def load_golden(name):
    return load_file(GOLDEN / name, str(torch.get_default_device()))


def load_case(case):
    """Returns a golden case: its upstream config, weights, forward arguments under our names, and results."""
    with safe_open(GOLDEN / f"a_stdit2_{case}.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["json"])
    weights = "a_weights_noqknorm.safetensors" if "noqknorm" in case else "a_weights_qknorm.safetensors"
    with safe_open(GOLDEN / weights, "pt") as file:
        config = meta.get("config") or json.loads(file.metadata()["json"])["config"]
    tensors = load_golden(f"a_stdit2_{case}.safetensors")
    our_names = {"timestep": "t", "mask": "y_mask"}
    args = {}
    for key, value in tensors.items():
        if key.startswith("in."):
            name = key.removeprefix("in.")
            args[our_names.get(name, name)] = value
    if "y" in args:
        args["y"] = args["y"].squeeze(1)
    return config, load_golden(weights), args, tensors


def error(got, want):
    """Returns the relative L2 error; where want is exactly 0 (temporal attention of an image), the largest value."""
    norm = want.norm().item()
    return (got - want).norm().item() / norm if norm else got.abs().max().item()


def awake(config, seed=0):
    """Returns a model without zero weights: a fresh one outputs 0, which would pass any comparison."""
    generator = torch.Generator().manual_seed(seed)
    net = STDiT(config)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.1, generator=generator)
    return net


def inputs(config, B=2, T=3, h=4, w=6, L=5):
    """Returns random arguments for a forward; no two conditioning values are alike."""
    torch.manual_seed(1)
    args = {"x": torch.randn(B, config.in_channels, T, h, w), "t": torch.full((B,), 500),
            "y": torch.randn(B, L, config.caption_channels)}
    for name, value in {"height": 8 * h, "width": 8 * w, "num_frames": T, "ar": w / h, "fps": 8}.items():
        args[name] = torch.full((B,), float(value))
    return args


def outputs(net, args, **changed):
    with torch.no_grad():
        return net(**args | changed)


def gradients(net, args):
    """Returns the output, and the gradients of its product with a ramp."""
    net.zero_grad()
    out = net(**args)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}


@pytest.fixture
def one_process():
    """Makes a world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---- the released code ----

def assert_output_and_gradients_are_upstreams(case, limit=1e-5):
    config, weights, args, golden = load_case(case)
    net = from_upstream(config, weights)
    args["x"].requires_grad_()
    out = net(**args)
    assert out.dtype == torch.float32
    assert error(out.detach(), golden["out.out"]) < limit
    loss = (out * golden["out.loss_weight"]).sum()
    loss.backward()
    assert error(loss.detach(), golden["out.loss"][0]) < limit
    grads = {name: p.grad for name, p in net.named_parameters()}
    grads["x"] = args["x"].grad
    names = [key for key in golden if key.startswith("out.grad.")]
    assert len(names) >= 9
    for key in names:
        assert error(grads[key.removeprefix("out.grad.")], golden[key]) < limit, key


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_upstreams(case):
    assert_output_and_gradients_are_upstreams(case)


def test_output_and_gradients_are_upstreams_the_way_of_a_gpu(as_on_a_gpu):
    assert_output_and_gradients_are_upstreams("ii_xmask")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_output_and_gradients_are_upstreams(case):
    use_gpu_ops()
    with torch.device("cuda"):
        assert_output_and_gradients_are_upstreams(case, limit=2e-5)     # cuBLAS sums in another order


def test_a_guided_call_is_upstreams():
    """Rows are clips, then the same with null captions, which get the length of their clip's caption (a quirk)."""
    _, _, args, golden = load_case("cfg_null")
    config, weights, *_ = load_case("i_nomask")
    for name in args.keys() - {"x", "y", "t"}:
        args[name] = torch.cat([args[name], args[name]])
    net = from_upstream(config, weights)
    assert torch.equal(args["y"][2:], net.null_y.expand(2, -1, -1)), "rows 2 and 3 are the null caption"
    assert error(outputs(net, args), golden["out.out"]) < 1e-5
    args["y_mask"][2:] = 1
    assert error(outputs(net, args), golden["out.out"]) > 1e-3, "a null caption of full length is something else"


def test_a_dropped_caption_is_upstreams():
    _, _, args, golden = load_case("train_dropout")
    config, weights, *_ = load_case("ii_xmask")
    net = from_upstream(config, weights).train()
    assert torch.equal(golden["rand"] < config["class_dropout_prob"], golden["drop"])
    assert golden["drop"].any(), "the case must drop a caption"
    args["y"] = torch.where(golden["drop"][:, None, None], net.null_y, args["y"])
    assert error(outputs(net, args), golden["out.out"]) < 1e-5


def assert_bf16_is_as_close_to_fp32_as_upstreams():
    config, weights, args, _ = load_case("ii_xmask")
    golden = load_golden("a_stdit2_bf16.safetensors")
    out = outputs(from_upstream(config, weights).to(torch.bfloat16), args)
    assert out.dtype == torch.float32
    assert error(out, golden["ref_fp32"]) <= 1.2 * error(golden["out.out"], golden["ref_fp32"])


def test_bf16_is_as_close_to_fp32_as_upstreams(ops):
    assert_bf16_is_as_close_to_fp32_as_upstreams()


@pytest.mark.gpu
def test_on_a_gpu_bf16_is_as_close_to_fp32_as_upstreams():
    use_gpu_ops()
    with torch.device("cuda"):
        assert_bf16_is_as_close_to_fp32_as_upstreams()


def test_the_quirks_change_what_the_released_weights_compute():
    config, weights, args, golden = load_case("ii_xmask")
    net = from_upstream(config, weights)
    clean = STDiT(replace(net.config, as_released=False))
    clean.load_state_dict(weights, strict=True)
    assert error(outputs(clean, args), golden["out.out"]) > 1e-2


@pytest.mark.parametrize("rounded", [False, True])
def test_only_the_released_model_rounds_its_conditioning_to_bf16(rounded):
    """In bf16, 501 is 500 and 1001 is 1000."""
    net = awake(replace(SMALL, as_released=rounded)).to(torch.bfloat16)
    args = inputs(SMALL)
    args["height"] = torch.tensor([1000.0, 1000.0])
    out = outputs(net, args)
    assert torch.equal(outputs(net, args, t=torch.tensor([501, 501])), out) == rounded
    assert torch.equal(outputs(net, args, height=torch.tensor([1001.0, 1001.0])), out) == rounded


def test_the_embeddings_of_a_bf16_model_are_computed_in_fp32():
    """With angles in bf16 nothing would be left of the high frequencies of t = 999."""
    net = stdit.ScalarEmbedder(48)
    t = torch.arange(900.0, 1000.0)
    with torch.no_grad():
        exact = net(t)
        assert error(net.to(torch.bfloat16)(t).float(), exact) < 0.01


def test_embeddings_are_upstreams():
    golden = load_golden("f_embeddings.safetensors")
    tables = {"h3w3s1.000000bNone": (3, 3, 1.0), "h4w3s1.732051b3": (4, 3, 3 ** 0.5),
              "h5w8s0.375000b6": (5, 8, 0.375), "h9w16s0.375000b12": (9, 16, 0.375)}
    for key, (rows, columns, scale) in tables.items():
        assert error(stdit.position_table(rows, columns, scale, 48), golden[f"pos2d.{key}"][0]) < 1e-5, key
    assert error(stdit.frequencies(12), golden["rope.freqs"]) < 1e-6
    assert error(kernels.rope(golden["rope.in"], *stdit.rotary_table(6, 12)), golden["rope.out"]) < 1e-6
    for prefix, dim, arg in (("te.", 48, "t"), ("se.", 16, "s")):
        weights = {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix + "mlp")}
        net = stdit.ScalarEmbedder(dim)
        net.load_state_dict(weights, strict=True)
        assert error(net(golden[prefix + arg]).flatten(1), golden[prefix + "out"]) < 1e-5, prefix


def test_positions_count_in_cells_of_a_square_of_equal_area():
    """15 cells make a square of side round(15 ** 0.5) = 4; the last of 5 columns is at 4/5 of it in every row."""
    table = stdit.position_table(3, 5, 1.0, 48).unflatten(0, (3, 5))
    assert table[:, 4, 0].tolist() == pytest.approx([torch.tensor(4 * 4 / 5).sin().item()] * 3)


def test_temporal_attention_is_upstreams_only_with_the_rotation_first():
    golden = load_golden("f_embeddings.safetensors")
    weights = {}
    for key, value in golden.items():
        if key.startswith("attn.") and key.endswith(("weight", "bias")):
            weights[key.removeprefix("attn.")] = value
    errors = {}
    for rope_first in (True, False):
        net = stdit.Attention(replace(SMALL, as_released=rope_first))
        net.load_state_dict(weights, strict=True)
        out = net(golden["attn.in"][:, :, None], "time", stdit.rotary_table(6, 12))[:, :, 0]      # [N T C]
        errors[rope_first] = error(out, golden["attn.out_rope_then_norm"])
    assert errors[True] < 1e-5
    assert errors[False] > 1e-3


# ---- Open-Sora's weights ----

def test_xl_2_has_the_published_names_and_sizes():
    assert XL_2 == STDiTConfig()
    with torch.device("meta"):
        net = STDiT(XL_2)
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == 767_452_100
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 767_452_064
    assert sum(value.numel() for value in state.values()) == 768_271_300
    _, weights, *_ = load_case("i_nomask")
    first_two = {key for key in state if not key.startswith("blocks.") or key[7:9] in ("0.", "1.")}
    assert first_two == set(weights)
    in_a_block = [key for key in weights if key.startswith("blocks.0.")]
    assert len(state) == len(weights) + 26 * len(in_a_block)
    shapes = {"x_embedder.proj.weight": [1152, 4, 1, 2, 2], "t_block.1.weight": [6912, 1152],
              "y_embedder.y_embedding": [200, 4096], "csize_embedder.mlp.0.weight": [384, 256],
              "final_layer.linear.weight": [32, 1152], "rope.freqs": [36]}
    assert {key: list(state[key].shape) for key in shapes} == shapes


def test_keys_that_hugging_face_adds_to_a_config_change_nothing():
    config, weights, *_ = load_case("i_nomask")
    extra = {"architectures": ["STDiT2"], "model_type": "STDiT2", "from_pretrained": None, "freeze": None}
    net = from_upstream(config | extra, weights)
    assert asdict(net.config) == asdict(from_upstream(config, weights).config)


@pytest.mark.parametrize("mistake, named", [
    ("an unknown key", "no_such_key"),
    ("a value of another type", "depth is '2', expected int"),
    ("a weight is missing", "missing blocks.1.mlp.fc1.bias"),
    ("a weight is unknown", "unknown blocks.0.more"),
    ("a weight has another shape", r"blocks.1.mlp.fc1.bias \[3\]"),
    ("more blocks", "blocks.2"),
    ("other frequencies", "rope.freqs"),
])
def test_wrong_weights_are_named(mistake, named):
    config, weights, *_ = load_case("i_nomask")
    match mistake:
        case "an unknown key":
            config["no_such_key"] = 1
        case "a value of another type":
            config["depth"] = "2"
        case "a weight is missing":
            del weights["blocks.1.mlp.fc1.bias"]
        case "a weight is unknown":
            weights["blocks.0.more"] = torch.zeros(3)
        case "a weight has another shape":
            weights["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
        case "more blocks":
            config["depth"] = 3
        case "other frequencies":
            weights["rope.freqs"] = 2 * weights["rope.freqs"]
    with pytest.raises(ValueError, match=named):
        from_upstream(config, weights)


# ---- initialisation ----

def test_a_model_filled_late_is_the_same_as_one_filled_at_once():
    """FSDP makes models on the meta device and fills them afterwards."""
    with torch.device("meta"):
        late = STDiT(SMALL)
    late.to_empty(device="cpu")
    for value in late.state_dict().values():
        value.fill_(float("nan"))
    late.init_weights(seed=3)
    direct = STDiT(SMALL, seed=3).state_dict()
    for key, value in late.state_dict().items():
        assert torch.equal(value, direct[key]), key
    other = STDiT(SMALL, seed=4).state_dict()
    assert not torch.equal(direct["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


def test_initial_weights_follow_the_recipe_of_pixart_and_open_sora():
    state = STDiT(replace(SMALL, hidden_size=192, model_max_length=40)).state_dict()
    zero = {"blocks.0.attn_temp.proj.weight", "blocks.1.attn_temp.proj.weight", "blocks.0.cross_attn.proj.weight",
            "blocks.1.cross_attn.proj.weight", "final_layer.linear.weight"}
    assert {key for key, value in state.items() if not value.any() and not key.endswith("bias")} == zero
    std = {"t_embedder.mlp.0.weight": 0.02, "t_block.1.weight": 0.02, "t_block_temp.1.weight": 0.02,
           "y_embedder.y_proj.fc2.weight": 0.02, "y_embedder.y_embedding": 8 ** -0.5,
           "blocks.1.attn.qkv.weight": (2 / (4 * 192)) ** 0.5, "blocks.0.scale_shift_table": 192 ** -0.5}
    for key, want in std.items():
        assert state[key].std().item() == pytest.approx(want, rel=0.1), key
    assert torch.equal(state["rope.freqs"], stdit.frequencies(48))
    assert torch.equal(state["blocks.0.attn.q_norm.weight"], torch.ones(48))


def test_a_fresh_model_outputs_exactly_0():
    out = outputs(STDiT(SMALL), inputs(SMALL))
    assert out.shape == (2, 8, 3, 4, 6)
    assert not out.any()


# ---- PixArt-alpha's weights ----

FROM_PIXART = replace(XL_2, depth=2, hidden_size=48, num_heads=4, caption_channels=8, model_max_length=9, qk_norm=False)


@pytest.fixture(scope="module")
def pixart():
    """Returns diffusers' model with size conditions, as at 1024, no weight zero; its weights under PixArt's names."""
    from diffusers import PixArtTransformer2DModel
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48, num_layers=2,
                                   caption_channels=8, sample_size=128).eval()
    with torch.no_grad():
        for p in net.parameters():      # no bias starts as 0, and no two tensors are alike
            p.add_(0.1 * torch.randn(p.shape))
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    weights["caption_projection.y_embedding"] = torch.randn(6, 8)       # published, but not in diffusers' class
    return net, original_names(weights)


def original_names(weights):
    """Returns diffusers' weights under the names of PixArt's own .pth."""
    originals = {"pos_embed": torch.zeros(1, 4096, 48)}

    def take(ours, *theirs):
        for leaf in ("weight", "bias"):
            originals[f"{ours}.{leaf}"] = torch.cat([weights[f"{key}.{leaf}"] for key in theirs])

    take("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}.items():
        take(f"{ours}_embedder.mlp.0", f"adaln_single.emb.{theirs}_embedder.linear_1")
        take(f"{ours}_embedder.mlp.2", f"adaln_single.emb.{theirs}_embedder.linear_2")
    take("t_block.1", "adaln_single.linear")
    take("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    take("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    originals["y_embedder.y_embedding"] = torch.nn.Parameter(weights["caption_projection.y_embedding"])
    for n in range(2):
        block = f"blocks.{n}"
        theirs = f"transformer_blocks.{n}"
        originals[f"{block}.scale_shift_table"] = weights[f"{theirs}.scale_shift_table"]
        take(f"{block}.attn.qkv", f"{theirs}.attn1.to_q", f"{theirs}.attn1.to_k", f"{theirs}.attn1.to_v")
        take(f"{block}.attn.proj", f"{theirs}.attn1.to_out.0")
        take(f"{block}.cross_attn.q_linear", f"{theirs}.attn2.to_q")
        take(f"{block}.cross_attn.kv_linear", f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v")
        take(f"{block}.cross_attn.proj", f"{theirs}.attn2.to_out.0")
        take(f"{block}.mlp.fc1", f"{theirs}.ff.net.0.proj")
        take(f"{block}.mlp.fc2", f"{theirs}.ff.net.2")
    take("final_layer.linear", "proj_out")
    originals["final_layer.scale_shift_table"] = weights["scale_shift_table"]
    return originals


def model_with(state):
    net = STDiT(FROM_PIXART, seed=7)
    net.load_state_dict(state, strict=True)
    return net


@pytest.mark.parametrize("height, width", [(1024, 1024), (64, 144)])
def test_an_image_is_pixarts(pixart, height, width):
    """PixArt's final layer sees the size, ours that of 1024 x 1024: for other sizes the difference is added here."""
    theirs, originals = pixart
    net = model_with(from_pixart(originals, FROM_PIXART))
    args = inputs(FROM_PIXART, 2, 1, height // 8, width // 8, L=6)
    args["t"] = torch.tensor([7.0, 950.0])
    args["ar"] = torch.full((2,), height / width)       # PixArt's convention
    args["y_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    sizes = {"resolution": torch.stack([args["height"], args["width"]], 1), "aspect_ratio": args["ar"]}

    def size_vec(h, w):
        csize = net.csize_embedder(torch.tensor([float(h), float(w)])).flatten()
        return torch.cat([csize, net.ar_embedder(torch.tensor(h / w))])

    with torch.no_grad():
        want = theirs(args["x"][:, :, 0], args["y"], args["t"], encoder_attention_mask=args["y_mask"],
                      added_cond_kwargs=sizes).sample
        if (height, width) != (1024, 1024):
            assert error(net(**args)[:, :, 0], want) > 1e-3
            net.final_layer.scale_shift_table += size_vec(height, width) - size_vec(1024, 1024)
        assert error(net(**args)[:, :, 0], want) < 1e-5


def test_pixarts_own_file_is_recognised(pixart, tmp_path):
    _, originals = pixart
    torch.save({"state_dict": originals}, tmp_path / "pixart.pth")
    weights = read_weights(tmp_path / "pixart.pth")
    assert is_pixart(weights)
    from_file = from_pixart(weights, FROM_PIXART)
    direct = from_pixart(originals, FROM_PIXART)
    assert from_file.keys() == direct.keys() == STDiT(FROM_PIXART).state_dict().keys()
    for key, value in from_file.items():
        assert torch.equal(value, direct[key]), key
        assert not value.requires_grad, key
    _, upstreams, *_ = load_case("i_nomask")
    assert not is_pixart(upstreams)
    assert not is_pixart({"x_embedder.proj.weight": torch.ones(1)}), "DiT's, say"


def test_given_weights_are_not_changed(pixart):
    _, originals = pixart
    before = {name: value.clone() for name, value in originals.items()}
    from_pixart(originals, FROM_PIXART)
    assert originals.keys() == before.keys()
    for name, value in originals.items():
        assert torch.equal(value, before[name]), name


def test_the_null_caption_is_cut_or_its_last_token_repeated(pixart):
    _, originals = pixart
    null_y = originals["y_embedder.y_embedding"]
    longer = from_pixart(originals, FROM_PIXART)["y_embedder.y_embedding"]
    assert torch.equal(longer, torch.cat([null_y, null_y[-1:], null_y[-1:], null_y[-1:]]))
    shorter = from_pixart(originals, replace(FROM_PIXART, model_max_length=4))["y_embedder.y_embedding"]
    assert torch.equal(shorter, null_y[:4])


def test_what_pixart_lacks_is_as_initialised(pixart):
    config = replace(FROM_PIXART, qk_norm=True)
    state = from_pixart(pixart[1], config, seed=3)
    fresh = STDiT(config, seed=3).state_dict()
    same = {re.sub(r"blocks\.\d\.|\.(weight|bias)$", "", key) for key in state if torch.equal(state[key], fresh[key])}
    assert same == {
        "t_block_temp.1", "fl_embedder.mlp.0", "fl_embedder.mlp.2", "fps_embedder.mlp.0", "fps_embedder.mlp.2",
        "rope.freqs", "scale_shift_table_temporal", "attn.q_norm", "attn.k_norm",
        "attn_temp.qkv", "attn_temp.q_norm", "attn_temp.k_norm", "attn_temp.proj"}


def test_pixarts_weights_leave_each_frame_alone_at_first(pixart):
    """Four frames are four images, whatever num_frames and fps are, until temporal attention is trained."""
    net = model_with(from_pixart(pixart[1], FROM_PIXART))
    args = inputs(FROM_PIXART, T=4)
    of_an_image = {"num_frames": torch.ones(2), "fps": torch.full((2,), 120.0)}
    frames = [outputs(net, args, x=args["x"][:, :, i:i + 1], **of_an_image) for i in range(4)]
    images = torch.cat(frames, dim=2)
    assert images.std() > 1e-2
    assert error(outputs(net, args), images) < 1e-5
    with torch.no_grad():
        net.blocks[1].attn_temp.proj.weight.normal_(std=0.1)
    assert error(outputs(net, args), images) > 1e-3


@pytest.mark.parametrize("changed, named", [
    ({"patch_size": (2, 2, 2)}, r"x_embedder.proj.weight \[48, 4, 1, 2, 2\]"),
    ({"depth": 1}, "unknown blocks.1"),
    ({"depth": 3}, "missing blocks.2"),
    ({"input_sq_size": 256}, "input_sq_size=256"),
    ({"temporal_pos": True}, "temporal_pos=True"),
])
def test_a_config_that_does_not_suit_pixart_is_named(pixart, changed, named):
    with pytest.raises(ValueError, match=named):
        from_pixart(pixart[1], replace(FROM_PIXART, **changed))


def test_weights_that_are_not_pixarts_are_named(pixart):
    _, originals = pixart
    odd = originals | {"blocks.0.attn.rel_pos_h": torch.zeros(3)}
    with pytest.raises(ValueError, match="odd.pth: .*unknown blocks.0.attn.rel_pos_h"):
        from_pixart(odd, FROM_PIXART, source="odd.pth")
    for missing in ("x_embedder.proj.weight", "csize_embedder.mlp.0.weight", "y_embedder.y_embedding"):
        some = {key: value for key, value in originals.items() if key != missing}
        with pytest.raises(ValueError, match=f"odd.pth: .*missing {missing}"):
            from_pixart(some, FROM_PIXART, source="odd.pth")


# ---- files of weights ----

def random_weights(num=5):
    torch.manual_seed(0)
    return {f"layer.{n}.weight": torch.randn(n + 1) for n in range(num)}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def save_shards(folder, weights):
    """Writes weights as two shards and their index; returns the index."""
    weight_map = {}
    for n, name in enumerate(weights):
        weight_map[name] = f"model-0000{n % 2 + 1}-of-00002.safetensors"
    for shard in set(weight_map.values()):
        save_file({name: value for name, value in weights.items() if weight_map[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": weight_map}))
    return index


def test_weights_are_read_from_every_kind_of_file(tmp_path):
    weights = random_weights()
    save_file(weights, tmp_path / "model.safetensors")
    assert_same(read_weights(tmp_path / "model.safetensors"), weights)
    assert_same(read_weights(str(tmp_path)), weights)
    parallel = {f"module.{key}": value for key, value in weights.items()}       # DistributedDataParallel's names
    optimizer = {"state": {0: {"exp_avg": torch.ones(1)}}}
    contents = {"plain.pth": weights, "wrapped.pt": {"state_dict": weights, "epoch": 3}, "parallel.pth": parallel,
                "model.bin": {"model": weights, "step": torch.tensor(3), "optimizer": optimizer},
                "average.pth": {"ema": parallel}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        assert_same(read_weights(tmp_path / name), weights)
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same(read_weights(tmp_path / "old.pth"), weights)


def test_shards_are_read_by_their_folder_or_their_index(tmp_path):
    weights = random_weights()
    index = save_shards(tmp_path, weights)
    assert_same(read_weights(tmp_path), weights)
    assert_same(read_weights(index), weights)


def test_a_missing_shard_is_named(tmp_path):
    index = save_shards(tmp_path, random_weights())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors"):
        read_weights(index)


@pytest.mark.parametrize("text, named", [("", "JSON"), ("{", "JSON"), ("[]", "list"), ("{}", "weight_map"),
                                         ('{"weight_map": {"a": 1}}', "weight_map")])
def test_a_broken_index_is_named(tmp_path, text, named):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=f"index.json .*{named}"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content, named", [
    ({"model": random_weights(), "ema": random_weights()}, "model, ema"),                   # DiT's, Latte's
    ({"epoch": 3, "loss": 0.5}, "epoch, loss"),
    ({"weight": torch.ones(1), "epoch": 3}, "weight, epoch"),
    ({0: torch.ones(1)}, "dict of 0"),
    ({}, "a dict"),
    ([torch.ones(1)], "list"),
    (torch.ones(1), "Tensor"),
])
def test_what_a_file_holds_in_place_of_weights_is_named(tmp_path, content, named):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth holds .*{named}.*, expected one dict of tensors"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("start", [b"", b"version https://git-lfs.github.com/spec/v1", b"<html>", b"hello", b"PK\3\4"])
def test_a_file_of_another_kind_is_named(tmp_path, start):
    """Some of these make torch's reader raise errors such as KeyError."""
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(ValueError, match=name) as raised:
            read_weights(tmp_path / name)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match=re.escape(repr(start[:24]))):
        read_weights(tmp_path / "w.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TorchScript")
def test_torchs_advice_to_run_the_code_in_a_file_is_not_passed_on(tmp_path):
    """DiT's training checkpoints hold the parsed command line."""
    torch.save({"model": random_weights(), "args": argparse.Namespace(lr=1)}, tmp_path / "object.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(argparse.Namespace(lr=1)))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pth")
    for name in ("object.pth", "pickle.pth", "script.pth"):
        with pytest.raises(ValueError, match=name) as raised:
            read_weights(tmp_path / name)
        message = str(raised.value)
        assert "weights_only" not in message and len(message.splitlines()) == 1
        assert raised.value.__cause__ is None and raised.value.__suppress_context__
    with pytest.raises(ValueError, match="argparse.Namespace"):
        read_weights(tmp_path / "object.pth")


def test_the_layout_of_diffusers_is_named(tmp_path):
    (tmp_path / "hub/transformer").mkdir(parents=True)
    file = tmp_path / "hub/transformer/diffusion_pytorch_model.safetensors"
    save_file(random_weights(), file)
    for path in (tmp_path / "hub", tmp_path / "hub/transformer", file):
        with pytest.raises(ValueError, match="diffusers.*PixArt-XL-2-1024-MS.pth of PixArt-alpha/PixArt-alpha"):
            read_weights(path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/model.safetensors does not exist"):
        read_weights(tmp_path)


# ---- properties ----

@pytest.mark.parametrize("patch, shape", [((1, 2, 2), (3, 5, 7)), ((2, 2, 2), (3, 5, 4)), ((1, 4, 4), (1, 2, 9))])
def test_any_size_is_padded_with_zeros_at_the_end_and_cropped(patch, shape):
    config = replace(SMALL, patch_size=patch)
    net = awake(config)
    args = inputs(config, 2, *shape)
    T, h, w = shape
    whole = [-(-n // p) * p for n, p in zip(shape, patch)]
    padded = torch.zeros(2, 4, *whole)
    padded[:, :, :T, :h, :w] = args["x"]
    out = outputs(net, args)
    assert out.shape == (2, 8, *shape)
    assert out.std() > 0
    assert torch.equal(out, outputs(net, args, x=padded)[:, :, :T, :h, :w])


def test_patches_are_read_as_a_convolution_does():
    embed = STDiT(replace(SMALL, patch_size=(2, 2, 2))).x_embedder
    x = torch.randn(2, 4, 4, 6, 8)
    with torch.no_grad():
        assert error(embed(x), embed.proj(x).flatten(3).permute(0, 2, 3, 1)) < 1e-6


@pytest.mark.parametrize("as_released", [False, True])
def test_a_given_frame_is_at_time_0(as_released):
    """With Q3 the final layer also sees the time of the noised frames and the size."""
    config = replace(SMALL, as_released=as_released)
    net = awake(config)
    args = inputs(config)
    plain = outputs(net, args)
    at_0 = outputs(net, args, t=torch.zeros(2))
    all_noised = outputs(net, args, x_mask=torch.ones(2, 3, dtype=torch.bool))
    all_given = outputs(net, args, x_mask=torch.zeros(2, 3, dtype=torch.bool))
    one_given = outputs(net, args, x_mask=torch.tensor([[True, True, True], [False, True, True]]))
    assert error(all_noised, plain) < 1e-6
    assert error(one_given[0], plain[0]) < 1e-6
    assert error(one_given[1], plain[1]) > 1e-3
    assert (error(all_given, at_0) < 1e-6) != as_released


def test_given_frames_do_not_see_t():
    net = awake(SMALL)
    args = inputs(SMALL)
    args["x_mask"] = torch.zeros(2, 3, dtype=torch.bool)
    early = outputs(net, args, t=torch.full((2,), 10.0))
    late = outputs(net, args, t=torch.full((2,), 900.0))
    assert torch.equal(early, late)


def test_masked_text_does_not_count():
    net = awake(SMALL)
    args = inputs(SMALL)
    y_mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    out = outputs(net, args, y_mask=y_mask)
    noisy = args["y"] + 5 * (1 - y_mask)[:, :, None]
    assert torch.equal(out, outputs(net, args, y=noisy, y_mask=y_mask.bool()))
    alone = {key: value[:1] for key, value in args.items()}
    assert error(out[:1], outputs(net, alone, y=args["y"][:1, [0, 2, 3]])) < 1e-5
    assert error(out, outputs(net, args)) > 1e-4


def test_clips_of_a_batch_do_not_mix():
    net = awake(SMALL)
    args = inputs(SMALL, B=3)
    args["y_mask"] = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    last = {key: value[2:] for key, value in args.items()}
    assert error(outputs(net, args)[2:], outputs(net, last)) < 1e-5


@pytest.mark.parametrize("name", ["t", "height", "width", "num_frames", "ar", "fps", "y"])
def test_every_condition_is_used(name):
    net = awake(SMALL)
    args = inputs(SMALL)
    assert error(outputs(net, args, **{name: args[name] * 1.5}), outputs(net, args)) > 1e-5


def test_temporal_pos_makes_equal_frames_differ():
    """Rotary attention alone gives equal frames for equal frames, since a softmax over equal keys is uniform."""
    args = inputs(SMALL)
    args["x"] = args["x"][:, :, :1].expand(-1, -1, 3, -1, -1)
    with_positions = outputs(awake(replace(SMALL, temporal_pos=True)), args)
    without = outputs(awake(replace(SMALL, temporal_pos=False)), args)
    assert error(without[:, :, 0], without[:, :, 2]) < 1e-5
    assert error(with_positions[:, :, 0], with_positions[:, :, 2]) > 1e-3


# ---- how it is run: sharded, checkpointed, compiled, shared among ranks ----

def test_a_fully_sharded_model_computes_the_same(one_process):
    """Outside their module's forward parameters are DTensors under FSDP2, and using one there raises."""
    with torch.device("meta"):
        net = STDiT(SMALL)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net.to_empty(device="cpu")
    net.init_weights(seed=5)
    plain = STDiT(SMALL, seed=5)
    state = plain.state_dict()
    for key, value in net.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        assert torch.equal(whole, state[key]), key
    args = inputs(SMALL)
    args["x_mask"] = torch.tensor([[True, False, True]] * 2)
    for some in (net, plain):           # one step away from the zero output
        optimizer = torch.optim.SGD([p for p in some.parameters() if p.requires_grad], lr=1.0)
        some(**args).sum().backward()
        optimizer.step()
    out = outputs(plain, args)
    assert out.any()
    assert error(outputs(net, args), out) < 1e-5


def assert_same_output_and_gradients(net, want, wants, args):
    out, grads = gradients(net, args)
    assert error(out, want) < 1e-6
    for name, grad in grads.items():
        assert error(grad, wants[name]) < 1e-4, name        # fp32 is 4e-5 from fp64 here


def masked_inputs(config):
    args = inputs(config)
    args["x_mask"] = torch.tensor([[True, False, True]] * 2)
    return args


def test_a_checkpointed_model_computes_the_same(ops):
    """A checkpointed block computes its forward twice."""
    args = masked_inputs(SMALL)
    want, wants = gradients(awake(SMALL), args)
    net = awake(SMALL)
    net.blocks[0].forward = partial(checkpoint, net.blocks[0].forward, use_reentrant=False)
    assert_same_output_and_gradients(net, want, wants, args)


@pytest.mark.slow
def test_a_compiled_model_computes_the_same(ops):
    """torch.compile takes the plain form whatever is chosen."""
    args = masked_inputs(SMALL)
    want, wants = gradients(awake(SMALL), args)
    net = awake(SMALL)
    for block in net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same_output_and_gradients(net, want, wants, args)


def held_per_token(B, dtype, per_frame):
    """Returns the elements that a block keeps for backward, per token and unit of width, without its parameters."""
    config = replace(SMALL, num_heads=2, depth=1)
    device = torch.get_default_device()
    block = STDiT(config).blocks[0].to(device, dtype)
    T, S, C, L = 4, 64, config.hidden_size, 4
    frames = T if per_frame else 1
    x = torch.randn(B, T, S, C, dtype=dtype, requires_grad=True)
    mod = torch.randn(B, frames, 6 * C, dtype=dtype, requires_grad=True)
    mod_temp = torch.randn(B, frames, 3 * C, dtype=dtype, requires_grad=True)
    text = torch.randn(B * L, C, dtype=dtype, requires_grad=True)
    kept = []           # holds the tensors: the address of a freed storage could come again

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, mod, mod_temp, text, [L] * B, stdit.rotary_table(T, config.head_dim, device))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in (*block.parameters(), mod, mod_temp, text):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / x.nbytes


def test_on_a_gpu_a_block_is_to_hold_little_for_backward(as_on_a_gpu):
    """The plain form holds 36 to 47."""
    assert held_per_token(1, torch.float32, per_frame=False) < 28.5
    assert held_per_token(2, torch.bfloat16, per_frame=True) < 29.5
    kernels.use("cpu", plain=True)
    assert held_per_token(2, torch.bfloat16, per_frame=True) > 35


@pytest.mark.gpu
def test_on_a_gpu_a_block_holds_little_for_backward():
    use_gpu_ops()
    with torch.device("cuda"):
        assert held_per_token(1, torch.float32, per_frame=False) < 30
        assert held_per_token(2, torch.bfloat16, per_frame=True) < 30


def shared_clips():
    """Returns (config, arguments): frames and positions not divisible by 2 or 4, and an image."""
    masked = inputs(SMALL, T=5, h=3, w=5)
    masked["x_mask"] = torch.ones(2, 5, dtype=torch.bool)
    masked["x_mask"][0, 0] = False
    masked["x_mask"][1, -1] = False
    quirky = replace(SMALL, as_released=True, patch_size=(1, 2, 2))
    return [(SMALL, inputs(SMALL, T=5, h=3, w=5)), (quirky, masked), (SMALL, inputs(SMALL, T=1, h=3, w=5))]


def assert_ranks_share(config, args, group):
    """Asserts that each rank of the group returns the whole output, and that the gradients' mean is right."""
    net = awake(config)
    want, wants = gradients(net, args)
    kernels.sequence_parallel(net, group)
    out, grads = gradients(net, args)
    assert error(out, want) < 1e-6, config
    for name, grad in grads.items():
        dist.all_reduce(grad, group=group)
        grad /= group.size()
        assert error(grad, wants[name]) < 1e-5, (name, config)


def test_two_ranks_share_a_clip():
    """The ranks are threads here; test_four_processes_share_a_clip starts processes."""
    config, args = shared_clips()[1]

    def run(group):
        assert_ranks_share(config, args, group)

    in_threads(2, run)


def share_clips(rank, store):
    """Runs one of four processes: with one other, then with all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    for size in (2, 4):
        group, _ = dist.new_subgroups(size)
        for config, args in shared_clips():
            assert_ranks_share(config, args, group)
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_processes_share_a_clip(tmp_path):
    torch.multiprocessing.spawn(share_clips, (str(tmp_path / "store"),), nprocs=4)


# ---- mistakes of users ----

@pytest.mark.parametrize("name, value, named", [
    ("x", torch.zeros(2, 3, 3, 4, 6), r"^x .*4.*\[2, 3, 3, 4, 6\]"),
    ("x", torch.zeros(2, 4, 4, 6), r"^x .*4.*\[2, 4, 4, 6\]"),
    ("t", torch.zeros(3), r"^t .*\[2\].*\[3\]"),
    ("t", torch.tensor(5), r"^t .*\[2\].*\[\]"),
    ("y", torch.zeros(2, 1, 5, 8), r"^y .*8.*\[2, 1, 5, 8\]"),
    ("y", torch.zeros(2, 5, 9), r"^y .*\[2, 5, 8\].*\[2, 5, 9\]"),
    ("y", torch.zeros(1, 5, 8), r"^y .*\[2, 5, 8\].*\[1, 5, 8\]"),
    ("y_mask", torch.ones(2, 6), r"^y_mask .*\[2, 5\].*\[2, 6\]"),
    ("y_mask", torch.tensor([[1] * 5, [0] * 5]), r"^y_mask row 1 "),
    ("x_mask", torch.ones(2, 4, dtype=torch.bool), r"^x_mask .*\[2, 3\].*\[2, 4\]"),
    ("x_mask", torch.ones(2, 3), r"^x_mask .*bool.*torch.float32"),
    ("height", None, r"^height .*\[2\].*None"),
    ("fps", torch.zeros(4), r"^fps .*\[2\].*\[4\]"),
])
def test_a_wrong_argument_is_named(name, value, named):
    with pytest.raises(ValueError, match=named):
        STDiT(SMALL)(**inputs(SMALL) | {name: value})


def test_x_mask_needs_patches_of_one_frame():
    config = replace(SMALL, patch_size=(2, 2, 2))
    with pytest.raises(ValueError, match=r"x_mask .*\(2, 2, 2\)"):
        STDiT(config)(**inputs(config, T=4), x_mask=torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("wrong, named", [
    ({"hidden_size": 128}, "hidden_size .*12.*128"),
    ({"num_heads": 5}, "48 / 5"),
    ({"num_heads": 16}, "48 / 16"),
    ({"depth": 0}, "depth"),
])
def test_a_wrong_width_is_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **wrong)


# ---- cost ----

def test_flops_are_those_torch_counts():
    config = replace(SMALL, patch_size=(1, 2, 2))
    C = config.hidden_size
    args = inputs(config, B=1, T=4, h=15, w=16, L=9)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):       # it counts no other attention
        outputs(STDiT(config), args)
    vectors = 2 * (3 * (256 + C) * C + 3 * (256 + C // 3) * C // 3 + 9 * C * C)     # time and sizes: not in flops()
    assert flops(config, 4, 15, 16, L=9) == counter.get_total_flops() - vectors
    assert flops(XL_2, 16, 18, 32, L=100) / 1e9 == pytest.approx(3177 - 1.2, abs=0.5)       # as upstream's


# ---- python model.py ----

def test_the_script_prints_the_number_of_parameters(run_script):
    ended = run_script("model")
    assert ended.status == 0
    assert "767,452,100" in ended.out


@pytest.mark.slow
def test_python_model_py_starts():
    done = subprocess.run([sys.executable, "model.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "767,452,100" in done.stdout


@pytest.mark.slow
def test_the_benchmark_of_a_block_runs(monkeypatch, capsys):
    import bench_model
    monkeypatch.setattr(bench_model, "XL_2", SMALL)
    monkeypatch.setattr(bench_model, "SHAPES", {"cpu": [(1, 2, 3, 4)]})
    bench_model.bench("cpu", rounds=1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("1 x 2x6x8")]
    assert len(rows) == 4
