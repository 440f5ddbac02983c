"""model.py against the released ST-DiT-2: golden/a_*, f_* are what Open-Sora 1.1.0 computes with random weights.

The a_* cases share two state dicts, a_weights_*; a_stdit2_<case> holds the arguments and results of a case.
"""
import json
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import kernels
import model as stdit
from model import TINY, XL_2, STDiT, STDiTConfig, flops, from_pixart, from_upstream, num_params

GOLDEN = Path(__file__).parent / "golden"
CASES = ["i_nomask", "i_textmask_none", "ii_xmask", "iv_image", "iv_image_xmask", "vi_sq512_noqknorm"]
SMALL = replace(TINY, depth=2, hidden_size=48, num_heads=4, in_channels=4, caption_channels=8, model_max_length=6)


def load(case):
    """A golden case: its upstream config, weights, forward arguments under our names, and results."""
    with safe_open(GOLDEN / f"a_stdit2_{case}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key).to(torch.get_default_device()) for key in file.keys()}   # noqa: SIM118
        meta = json.loads(file.metadata()["json"])
    weights = GOLDEN / f"a_weights_{'no' if 'noqknorm' in case else ''}qknorm.safetensors"
    with safe_open(weights, "pt") as file:
        config = meta.get("config") or json.loads(file.metadata()["json"])["config"]
    names = {"timestep": "t", "mask": "y_mask"}
    args = {names.get(key[3:], key[3:]): value for key, value in tensors.items() if key.startswith("in.")}
    if "y" in args:
        args["y"] = args["y"].squeeze(1)
    return config, load_golden(weights.name), args, tensors


def load_golden(name):
    return load_file(GOLDEN / name, str(torch.get_default_device()))


def error(got, want):
    """Relative L2; where upstream has exactly 0 (temporal attention of an image), the largest value."""
    norm = want.norm().item()
    return (got - want).norm().item() / norm if norm else got.abs().max().item()


def awake(config, seed=0):
    """A fresh model outputs 0, which would pass any comparison: fill what is zero with seeded noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.device("cpu"):
        net = STDiT(config)
        for p in net.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.1, generator=generator)
    return net.to(torch.get_default_device())


def inputs(config, B=2, T=3, h=4, w=6, L=5):
    torch.manual_seed(1)
    return stdit.example_inputs(config, B, T, h, w, L)


# ---- parity with the released code ----

@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_upstreams(case, all_ops):
    config, weights, args, golden = load(case)
    net = from_upstream(config, weights)
    args["x"].requires_grad_()
    out = net(**args)
    assert out.dtype == torch.float32
    limit = 2e-5 if all_ops == "CUDA" else 1e-5         # cuBLAS adds up in another order
    assert error(out.detach(), golden["out.out"]) < limit
    loss = (out * golden["out.loss_weight"]).sum()
    loss.backward()
    assert error(loss.detach(), golden["out.loss"][0]) < limit
    grads = {name: p.grad for name, p in net.named_parameters()} | {"x": args["x"].grad}
    names = [key for key in golden if key.startswith("out.grad.")]
    assert len(names) >= 9, names
    for key in names:
        assert error(grads[key[len("out.grad."):]], golden[key]) < limit, key


def test_guidance_call_is_upstreams():
    """Rows [clips, the same clips with null captions]; a null caption gets the length of its clip's (a quirk)."""
    _, _, args, golden = load("cfg_null")
    config, weights, *_ = load("i_nomask")
    args |= {key: torch.cat([value, value]) for key, value in args.items() if key not in ("x", "y", "t")}
    net = from_upstream(config, weights)
    assert torch.equal(args["y"][2:], net.null_y.expand(2, -1, -1)), "rows 2 and 3 are the null caption"
    with torch.no_grad():
        assert error(net(**args), golden["out.out"]) < 1e-5
        args["y_mask"][2:] = 1
        assert error(net(**args), golden["out.out"]) > 1e-3, "a full-length null caption is something else"


def test_caption_dropout_is_upstreams():
    _, _, args, golden = load("train_dropout")
    config, weights, *_ = load("ii_xmask")
    net = from_upstream(config, weights).train()
    assert torch.equal(golden["rand"] < config["class_dropout_prob"], golden["drop"])
    assert golden["drop"].any(), "the case must drop a caption"
    args["y"] = torch.where(golden["drop"][:, None, None], net.null_y, args["y"])
    with torch.no_grad():
        assert error(net(**args), golden["out.out"]) < 1e-5


def test_bf16_is_as_close_to_fp32_as_upstreams(all_ops):
    config, weights, args, _ = load("ii_xmask")
    golden = load_golden("a_stdit2_bf16.safetensors")
    with torch.no_grad():
        out = from_upstream(config, weights).to(torch.bfloat16)(**args)
    assert out.dtype == torch.float32
    assert error(out, golden["ref_fp32"]) <= 1.2 * error(golden["out.out"], golden["ref_fp32"])


@pytest.mark.parametrize("quirk", ["rope_before_norm", "final_twice"])
def test_quirk_is_seen_by_the_golden_case(quirk):
    config, weights, args, golden = load("ii_xmask")
    net = from_upstream(config, weights)
    clean = STDiT(replace(net.config, **{quirk: False}))
    clean.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert error(clean(**args), golden["out.out"]) > 1e-2


def test_quirk_round_conditions():
    t = torch.arange(1000)
    rounded = STDiT(replace(SMALL, round_conditions=True)).condition(t, torch.bfloat16)
    assert (rounded[999], rounded[501], rounded.unique().numel()) == (1000, 500, 507)
    assert torch.equal(STDiT(SMALL).condition(t, torch.bfloat16), t.float())


def test_embeddings_are_upstreams():
    golden = load_golden("f_embeddings.safetensors")
    tables = {"h3w3s1.000000bNone": (3, 3, 1.0), "h4w3s1.732051b3": (4, 3, 3 ** 0.5),
              "h5w8s0.375000b6": (5, 8, 0.375), "h9w16s0.375000b12": (9, 16, 0.375)}
    for key, (rows, columns, scale) in tables.items():
        assert error(stdit.position_table(rows, columns, scale, 48), golden[f"pos2d.{key}"][0]) < 1e-5, key
    assert error(stdit.frequencies(12), golden["rope.freqs"]) < 1e-6
    assert error(kernels.rope(golden["rope.in"], *stdit.rotary_table(6, 12)), golden["rope.out"]) < 1e-6
    for prefix, dim, arg in (("te.", 48, "t"), ("se.", 16, "s")):
        net = stdit.ScalarEmbedder(dim)
        net.load_state_dict({key[3:]: golden[key] for key in golden if key.startswith(prefix + "mlp")}, strict=True)
        assert error(net(golden[prefix + arg]).flatten(1), golden[prefix + "out"]) < 1e-5, prefix


def test_positions_count_in_cells_of_a_square_of_as_many():
    """15 cells make a square of side round(15 ** 0.5) = 4; the last of 5 columns is at 4/5 of it in every row."""
    table = stdit.position_table(3, 5, 1.0, 48).unflatten(0, (3, 5))
    assert table[:, 4, 0].tolist() == pytest.approx([torch.tensor(4 * 4 / 5).sin().item()] * 3)


def test_attention_is_upstreams(all_ops):
    golden = load_golden("f_embeddings.safetensors")
    names = [name for name in golden if name.startswith("attn.") and name.endswith(("weight", "bias"))]
    weights = {name[len("attn."):]: golden[name] for name in names}
    for rope_first in (True, False):
        net = stdit.Attention(replace(SMALL, rope_before_norm=rope_first))
        net.load_state_dict(weights, strict=True)
        out = net(golden["attn.in"][:, :, None], "time", stdit.rotary_table(6, 12))[:, :, 0]      # [N T C]
        wrong = error(out, golden["attn.out_rope_then_norm"])
        assert wrong < 1e-5 if rope_first else wrong > 1e-3, f"rope_before_norm={rope_first}: {wrong}"


# ---- weights in ----

def test_xl_2_has_the_published_keys_and_sizes():
    with torch.device("meta"):
        net = STDiT(XL_2)
    state = net.state_dict()
    assert num_params(XL_2) == 767_452_100
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 767_452_064
    assert sum(value.numel() for value in state.values()) == 768_271_300
    _, weights, *_ = load("i_nomask")
    assert {key for key in state if not key.startswith("blocks.") or key[7:9] in ("0.", "1.")} == set(weights)
    assert len(state) == len(weights) + 26 * sum(key.startswith("blocks.0.") for key in weights)
    shapes = {"x_embedder.proj.weight": [1152, 4, 1, 2, 2], "t_block.1.weight": [6912, 1152],
              "y_embedder.y_embedding": [200, 4096],
              "csize_embedder.mlp.0.weight": [384, 256], "final_layer.linear.weight": [32, 1152], "rope.freqs": [36]}
    assert {key: list(state[key].shape) for key in shapes} == shapes


def test_from_upstream_reads_hugging_face_configs_and_nothing_else():
    config, weights, *_ = load("i_nomask")
    extra = {"architectures": ["STDiT2"], "model_type": "STDiT2", "from_pretrained": None, "freeze": None}
    net = from_upstream(config | extra, weights)
    assert asdict(net.config) == asdict(from_upstream(config, weights).config)
    assert (net.config.rope_before_norm, net.config.round_conditions, net.config.final_twice) == (True, True, True)
    with pytest.raises(ValueError, match="no_such_key"):
        from_upstream(config | {"no_such_key": 1}, weights)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.bias"):
        from_upstream(config, {key: value for key, value in weights.items() if key != "blocks.1.mlp.fc1.bias"})
    with pytest.raises(ValueError, match=r"blocks.2"):
        from_upstream(config | {"depth": 3}, weights)
    with pytest.raises(ValueError, match=r"rope.freqs"):
        from_upstream(config, weights | {"rope.freqs": 2 * weights["rope.freqs"]})


def test_init_from_meta_equals_direct_init():
    with torch.device("meta"):
        late = STDiT(SMALL)
    late.to_empty(device="cpu")
    for value in late.state_dict().values():
        value.fill_(float("nan"))
    late.init_weights(seed=3)
    direct, other = STDiT(SMALL, seed=3).state_dict(), STDiT(SMALL, seed=4).state_dict()
    assert all(torch.equal(value, direct[key]) for key, value in late.state_dict().items())
    assert not torch.equal(direct["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


def test_init_follows_the_recipe():
    state = STDiT(replace(SMALL, hidden_size=192)).state_dict()
    zero = {"blocks.0.attn_temp.proj.weight", "blocks.1.attn_temp.proj.weight", "blocks.0.cross_attn.proj.weight",
            "blocks.1.cross_attn.proj.weight", "final_layer.linear.weight"}
    assert {key for key, value in state.items() if not value.any() and not key.endswith("bias")} == zero
    std = {"t_embedder.mlp.0.weight": 0.02, "t_block.1.weight": 0.02, "t_block_temp.1.weight": 0.02,
           "y_embedder.y_proj.fc2.weight": 0.02,
           "blocks.1.attn.qkv.weight": (2 / (4 * 192)) ** 0.5, "blocks.0.scale_shift_table": 192 ** -0.5}
    for key, want in std.items():
        assert state[key].std().item() == pytest.approx(want, rel=0.1), key
    assert torch.equal(state["rope.freqs"], stdit.frequencies(48))


@pytest.mark.parametrize("T", [1, 3])
def test_a_fresh_model_outputs_exactly_0(T):
    out = STDiT(SMALL)(**inputs(SMALL, T=T))
    assert out.shape == (2, 8, T, 4, 6)
    assert not out.any()


# ---- PixArt-alpha's weights ----

FROM_PIXART = replace(XL_2, depth=2, hidden_size=48, num_heads=4, caption_channels=8, model_max_length=9, qk_norm=False)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """diffusers' model with size conditions, as at 1024, no weight zero; its folder; the same weights as a .pth."""
    from diffusers import PixArtTransformer2DModel
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48, num_layers=2,
                                   caption_channels=8, sample_size=128).eval()
    with torch.no_grad():
        for p in net.parameters():      # no bias starts as 0, and no two tensors are alike
            p.add_(0.1 * torch.randn(p.shape))
    folder = tmp_path_factory.mktemp("pixart")
    net.save_pretrained(folder / "transformer")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file) | {"caption_projection.y_embedding": torch.randn(6, 8)}   # published, not in the class
    save_file(weights, file)

    own = {"pos_embed": torch.zeros(1, 4096, 48)}       # the original names, written out in full: a second opinion
    def take(ours, *theirs):
        for leaf in ("weight", "bias"):
            own[f"{ours}.{leaf}"] = torch.cat([weights[f"{key}.{leaf}"] for key in theirs])
    take("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in {"t": "timestep", "csize": "resolution", "ar": "aspect_ratio"}.items():
        take(f"{ours}_embedder.mlp.0", f"adaln_single.emb.{theirs}_embedder.linear_1")
        take(f"{ours}_embedder.mlp.2", f"adaln_single.emb.{theirs}_embedder.linear_2")
    take("t_block.1", "adaln_single.linear")
    take("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    take("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    own["y_embedder.y_embedding"] = torch.nn.Parameter(weights["caption_projection.y_embedding"])
    for n in range(2):
        block, theirs = f"blocks.{n}", f"transformer_blocks.{n}"
        own[f"{block}.scale_shift_table"] = weights[f"{theirs}.scale_shift_table"]
        take(f"{block}.attn.qkv", *(f"{theirs}.attn1.to_{x}" for x in "qkv"))
        take(f"{block}.attn.proj", f"{theirs}.attn1.to_out.0")
        take(f"{block}.cross_attn.q_linear", f"{theirs}.attn2.to_q")
        take(f"{block}.cross_attn.kv_linear", f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v")
        take(f"{block}.cross_attn.proj", f"{theirs}.attn2.to_out.0")
        take(f"{block}.mlp.fc1", f"{theirs}.ff.net.0.proj")
        take(f"{block}.mlp.fc2", f"{theirs}.ff.net.2")
    take("final_layer.linear", "proj_out")
    own["final_layer.scale_shift_table"] = weights["scale_shift_table"]
    torch.save({"state_dict": own}, folder / "pixart.pth")
    return net, folder, weights, own


def loaded(state):
    net = STDiT(FROM_PIXART, seed=7)
    net.load_state_dict(state, strict=True)
    return net


@pytest.mark.parametrize("height, width", [(1024, 1024), (64, 144)])
def test_an_image_is_pixarts(pixart, height, width):
    """PixArt is told height / width as ar.  Its final layer sees the size, ours that of 1024 x 1024: swapped here."""
    theirs, folder, *_ = pixart
    net, args = loaded(from_pixart(folder, FROM_PIXART)), inputs(FROM_PIXART, 2, 1, height // 8, width // 8, L=6)
    args |= {"t": torch.tensor([7.0, 950.0]), "height": torch.full((2,), float(height)),
             "width": torch.full((2,), float(width)), "ar": torch.full((2,), height / width)}
    y_mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    size_vec = lambda h, w: torch.cat([net.csize_embedder(torch.tensor([h, w])).flatten(),
                                       net.ar_embedder(torch.tensor(h / w))])
    with torch.no_grad():
        want = theirs(args["x"][:, :, 0], args["y"], args["t"], encoder_attention_mask=y_mask, added_cond_kwargs={
            "resolution": torch.stack([args["height"], args["width"]], 1), "aspect_ratio": args["ar"]}).sample
        if (height, width) != (1024, 1024):
            assert error(net(**args, y_mask=y_mask)[:, :, 0], want) > 1e-3
            net.final_layer.scale_shift_table += size_vec(float(height), float(width)) - size_vec(1024.0, 1024.0)
        assert error(net(**args, y_mask=y_mask)[:, :, 0], want) < 1e-5


def test_pixarts_own_file_gives_the_same_weights(pixart):
    _, folder, _, own = pixart
    a, b = from_pixart(folder / "transformer", FROM_PIXART), from_pixart(folder / "pixart.pth", FROM_PIXART)
    assert a.keys() == b.keys() == STDiT(FROM_PIXART).state_dict().keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(value.requires_grad for value in b.values())
    null_y = own["y_embedder.y_embedding"]
    assert torch.equal(a["y_embedder.y_embedding"], torch.cat([null_y, null_y[-1:], null_y[-1:], null_y[-1:]]))
    short = from_pixart(folder, replace(FROM_PIXART, model_max_length=4))
    assert torch.equal(short["y_embedder.y_embedding"], null_y[:4])


def test_what_pixart_lacks_is_as_initialised(pixart):
    config = replace(FROM_PIXART, qk_norm=True)
    state, fresh = from_pixart(pixart[1], config, seed=3), STDiT(config, seed=3).state_dict()
    same = {key for key in state if torch.equal(state[key], fresh[key])}
    assert {re.sub(r"blocks\.\d\.|\.(weight|bias)$", "", key) for key in same} == {
        "t_block_temp.1", "fl_embedder.mlp.0", "fl_embedder.mlp.2", "fps_embedder.mlp.0", "fps_embedder.mlp.2",
        "rope.freqs", "scale_shift_table_temporal", "attn.q_norm", "attn.k_norm",
        "attn_temp.qkv", "attn_temp.q_norm", "attn_temp.k_norm", "attn_temp.proj"}


def test_from_pixart_leaves_each_frame_alone(pixart):
    """Four frames at once are four images, whatever num_frames and fps are, until temporal attention is trained."""
    net, args = loaded(from_pixart(pixart[1], FROM_PIXART)), inputs(FROM_PIXART, T=4)
    one = args | {"num_frames": torch.ones(2), "fps": torch.full((2,), 120.0)}
    with torch.no_grad():
        images = torch.cat([net(**one | {"x": args["x"][:, :, i:i + 1]}) for i in range(4)], dim=2)
        assert images.std() > 1e-2
        assert error(net(**args), images) < 1e-5
        net.blocks[1].attn_temp.proj.weight.normal_(std=0.1)
        assert error(net(**args), images) > 1e-3


def test_from_pixart_names_what_does_not_fit(pixart, tmp_path):
    _, folder, weights, own = pixart
    def write(weights):
        torch.save({"state_dict": weights}, tmp_path / "odd.pth")
        return tmp_path / "odd.pth"
    without = lambda key: {k: v for k, v in own.items() if k != key}
    with pytest.raises(ValueError, match=r"unknown weights \['blocks.0.attn.rel_pos_h'\]"):
        from_pixart(write(own | {"blocks.0.attn.rel_pos_h": torch.zeros(3)}), FROM_PIXART)
    for key in ("csize_embedder.mlp.0.weight", "y_embedder.y_embedding", "blocks.1.attn.qkv.bias"):
        with pytest.raises(ValueError, match=f"has no {key}"):
            from_pixart(write(without(key)), FROM_PIXART)
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight \[48, 4, 1, 2, 2\], expected \[48, 4, 2, 2, 2\]"):
        from_pixart(folder, replace(FROM_PIXART, patch_size=(2, 2, 2)))
    with pytest.raises(ValueError, match=r"unknown weights \['transformer_blocks.1.attn1"):
        from_pixart(folder, replace(FROM_PIXART, depth=1))
    with pytest.raises(ValueError, match=r"has no transformer_blocks.2.scale_shift_table"):
        from_pixart(folder, replace(FROM_PIXART, depth=3))
    for wrong in ({"num_heads": 2}, {"input_sq_size": 256}, {"temporal_pos": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            from_pixart(folder, replace(FROM_PIXART, **wrong))
    odd = tmp_path / "folder"
    shutil.copytree(folder / "transformer", odd)
    file = odd / "diffusion_pytorch_model.safetensors"
    for missing in ("transformer_blocks.0.attn2.to_v.bias", "proj_out.weight"):
        save_file({k: v for k, v in weights.items() if k != missing}, file)
        with pytest.raises(ValueError, match=f"has no {missing}"):
            from_pixart(odd, FROM_PIXART)
    save_file({k: v for k, v in weights.items() if k != "caption_projection.y_embedding"}, file)    # the class has none
    null_y = STDiT(FROM_PIXART, seed=5).null_y
    assert torch.equal(from_pixart(odd, FROM_PIXART, seed=5)["y_embedder.y_embedding"], null_y)


# ---- properties ----

@pytest.mark.parametrize("patch, shape", [
    ((1, 2, 2), (3, 5, 7)), ((1, 1, 1), (2, 3, 5)), ((2, 2, 2), (3, 5, 4)), ((1, 4, 4), (1, 2, 9)),
])
def test_any_size_is_padded_with_zeros_and_cropped(patch, shape):
    config = replace(SMALL, patch_size=patch)
    net, args = awake(config), inputs(config, 2, *shape)
    whole = [-(-n // p) * p for n, p in zip(shape, patch)]
    padded = torch.zeros(2, 4, *whole)
    padded[:, :, :shape[0], :shape[1], :shape[2]] = args["x"]
    with torch.no_grad():
        out = net(**args)
        want = net(**args | {"x": padded})[:, :, :shape[0], :shape[1], :shape[2]]
    assert out.shape == (2, 8, *shape)
    assert out.std() > 0
    assert torch.equal(out, want)


def test_patches_are_read_and_written_as_a_convolution_does():
    config = replace(SMALL, patch_size=(1, 2, 2))
    embed, x = STDiT(config).x_embedder, torch.randn(2, 4, 3, 4, 6)
    assert error(embed(x), embed.proj(x).flatten(3).permute(0, 2, 3, 1)) < 1e-6


@pytest.mark.parametrize("final_twice", [False, True])
def test_x_mask(final_twice, all_ops):
    config = replace(SMALL, final_twice=final_twice)
    net, args = awake(config), inputs(config)
    with torch.no_grad():
        plain, zero = net(**args), net(**args | {"t": torch.zeros(2)})
        full = net(**args, x_mask=torch.ones(2, 3, dtype=torch.bool))
        none = net(**args, x_mask=torch.zeros(2, 3, dtype=torch.bool))
        some = net(**args, x_mask=torch.tensor([[True, True, True], [False, True, True]]))
    assert error(full, plain) < 1e-6
    assert error(some[0], plain[0]) < 1e-6
    assert error(some[1], plain[1]) > 1e-3
    assert (error(none, zero) < 1e-6) != final_twice, "without Q3 a given frame is a frame at time 0"


def test_given_frames_do_not_see_t():
    """Given frames are at time 0 whatever t is."""
    net, args = awake(SMALL), inputs(SMALL)
    given = torch.zeros(2, 3, dtype=torch.bool)
    with torch.no_grad():
        a, b = (net(**args | {"t": torch.full((2,), t)}, x_mask=given) for t in (10.0, 900.0))
    assert torch.equal(a, b)


def test_masked_text_does_not_count():
    net, args = awake(SMALL), inputs(SMALL)
    y_mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    noisy = args["y"] + 5 * (1 - y_mask)[:, :, None]
    with torch.no_grad():
        out = net(**args, y_mask=y_mask)
        assert torch.equal(out, net(**args | {"y": noisy}, y_mask=y_mask.bool()))
        alone = {key: value[:1] for key, value in args.items()} | {"y": args["y"][:1, [0, 2, 3]]}
        assert error(out[:1], net(**alone)) < 1e-5
        assert error(out, net(**args)) > 1e-4


def test_clips_of_a_batch_do_not_mix():
    net, args = awake(SMALL), inputs(SMALL, B=3)
    with torch.no_grad():
        out, last = net(**args), net(**{key: value[2:] for key, value in args.items()})
    assert error(out[2:], last) < 1e-5


@pytest.mark.parametrize("name", ["t", "height", "width", "num_frames", "ar", "fps", "y"])
def test_every_condition_is_used(name):
    net, args = awake(SMALL), inputs(SMALL)
    with torch.no_grad():
        assert error(net(**args | {name: args[name] * 1.5}), net(**args)) > 1e-5


def test_temporal_pos_tells_frames_apart():
    """All frames alike in, rotary only: all frames alike out, since a softmax over equal keys is uniform."""
    args = inputs(SMALL)
    args["x"] = args["x"][:, :, :1].expand(-1, -1, 3, -1, -1)
    with torch.no_grad():
        told, untold = (awake(replace(SMALL, temporal_pos=on))(**args) for on in (True, False))
    assert error(untold[:, :, 0], untold[:, :, 2]) < 1e-5
    assert error(told[:, :, 0], told[:, :, 2]) > 1e-3


def test_fully_sharded_it_computes_the_same(ops):
    """FSDP2 in a world of one: outside their module's forward parameters are DTensors, and using one there raises."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            net = STDiT(SMALL)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        net.to_empty(device="cpu")
        net.init_weights(seed=5)
        plain, args = STDiT(SMALL, seed=5), inputs(SMALL)
        args["x_mask"] = torch.tensor([[True, False, True]] * 2)
        for key, value in net.state_dict().items():
            assert torch.equal(getattr(value, "full_tensor", lambda v=value: v)(), plain.state_dict()[key]), key
        for some in (net, plain):   # one step away from the zero output
            optimizer = torch.optim.SGD([p for p in some.parameters() if p.requires_grad], lr=1.0)
            some(**args).sum().backward()
            optimizer.step()
        out = plain(**args)
        assert out.any()
        assert error(net(**args).detach(), out.detach()) < 1e-5
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("B, most", [(1, 28.5), (2, 29.5)])     # of two clips, the values of time are copied
def test_a_block_holds_little_for_backward(B, most, masked, ops):
    """In units of width per token; 40 are allowed."""
    for dtype in (torch.float32, torch.bfloat16):
        _, held = stdit.one_block(replace(SMALL, num_heads=2), B, 4, 64, 4, dtype, "cpu", masked)
        assert held > 35 if ops == "plain" else held < most, (ops, held)


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_or_compiled_it_computes_the_same(every, ops, monkeypatch):
    """torch.compile takes the plain form; a checkpointed block computes its forward twice."""
    config, args = replace(SMALL, depth=3), inputs(SMALL) | {"x_mask": torch.tensor([[True, False, True]] * 2)}
    want, wants = gradients(awake(config), args)
    thin, compiled = awake(config), awake(config)
    for block in thin.blocks[::every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for block in compiled.blocks[::every]:
        block.compile(backend="aot_eager", fullgraph=True)
    for net in (thin, compiled):
        out, grads = gradients(net, args)
        assert error(out.detach(), want.detach()) < 1e-6
        assert max(error(grads[name], wants[name]) for name in wants) < 1e-4    # fp32 is 4e-5 from fp64 here


def test_fake_tensors_take_no_compiled_op(ops):
    """The plan imagines a forward: C++ must not read memory that is not there."""
    size = SMALL, 2, 3, 4, 6, 5, torch.float32
    assert stdit.saved_bytes(*size) > stdit.forward_bytes(*size) > 0


def test_bench_prints_ratios(monkeypatch, capsys, ops):
    monkeypatch.setattr(stdit, "XL_2", SMALL)
    stdit.bench("cpu", rounds=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2].startswith("1 x 16x18x32") and "28." in lines[2], lines


# ---- wrong input ----

def gradients(net, args):
    net.zero_grad()
    out = net(**args)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out, {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}


def share_clips(rank, store, cases):
    """One of four processes: alone, then with one other, then with all."""
    torch.set_num_threads(1)
    kernels.use("cpu")
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    groups = [dist.new_subgroups(size)[0] for size in (2, 4)]
    gather, frames = dist.all_gather, torch.arange(24.0).view(2, 3, 4).mT                       # [2 4 3]

    def as_nccl_does(parts, x, group):
        assert all(part.is_contiguous() for part in (*parts, x)), "NCCL takes nothing else"
        gather(parts, x, group=group)

    dist.all_gather = as_nccl_does
    for group in groups:
        own = kernels.own_frames(frames, 4, group).mT.contiguous().mT
        assert torch.equal(kernels.all_frames(own, 4, group), frames)
    for config, args in cases:
        net = awake(config)
        one, one_grads = gradients(net, args)
        for net.group in groups:
            out, grads = gradients(net, args)
            assert error(out, one) < 1e-6, (config, net.group.size())
            for name, grad in grads.items():
                dist.all_reduce(grad, group=net.group)
                assert error(grad, one_grads[name]) < 1e-5, (name, config, net.group.size())
        net.group = None
    dist.destroy_process_group()


def test_two_or_four_ranks_share_a_clip(tmp_path):
    """Output and the sum of the gradients, frames and positions not divisible; an image leaves three ranks nothing."""
    cases = []
    for T, config in ((5, SMALL), (5, replace(SMALL, final_twice=True, patch_size=(1, 2, 2))), (1, SMALL)):
        args = inputs(config, T=T, h=3, w=5)
        x_mask = torch.ones(2, T, dtype=torch.bool)
        x_mask[0, 0] = x_mask[1, -1] = False
        cases += [(config, args), (config, args | {"x_mask": x_mask})]
    torch.multiprocessing.spawn(share_clips, (str(tmp_path / "store"), cases), nprocs=4)


@pytest.mark.parametrize("name, value, message", [
    ("x", torch.zeros(2, 3, 3, 4, 6), r"C_in = 4, got \[2, 3, 3, 4, 6\]"),
    ("x", torch.zeros(2, 4, 4, 6), r"C_in = 4, got \[2, 4, 4, 6\]"),
    ("t", torch.zeros(3), r"t must be \[B\] = \[2\], got \[3\]"),
    ("t", torch.tensor(5), r"t must be \[B\] = \[2\], got \[\]"),
    ("y", torch.zeros(2, 1, 5, 8), r"C_text = 8, got \[2, 1, 5, 8\]"),
    ("y", torch.zeros(2, 5, 9), r"y must be \[B L C_text\] = \[2, 5, 8\], got \[2, 5, 9\]"),
    ("y", torch.zeros(1, 5, 8), r"\[2, 5, 8\], got \[1, 5, 8\]"),
    ("y_mask", torch.ones(2, 6), r"y_mask must be \[B L\] = \[2, 5\], got \[2, 6\]"),
    ("y_mask", torch.tensor([[1] * 5, [0] * 5]), r"y_mask row 1 counts no token"),
    ("x_mask", torch.ones(2, 4, dtype=torch.bool), r"x_mask must be \[B T\] = \[2, 3\], got \[2, 4\]"),
    ("x_mask", torch.ones(2, 3), r"x_mask must be bool, True = noised, got torch.float32"),
    ("height", None, r"height must be \[B\] = \[2\], got None"),
    ("fps", torch.zeros(4), r"fps must be \[B\] = \[2\], got \[4\]"),
])
def test_wrong_shapes_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        STDiT(SMALL)(**inputs(SMALL) | {name: value})


def test_x_mask_needs_patches_of_one_frame():
    config = replace(SMALL, patch_size=(2, 2, 2))
    with pytest.raises(ValueError, match="patches of 1 frame"):
        STDiT(config)(**inputs(config, T=4), x_mask=torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("wrong, message", [
    ({"hidden_size": 128}, "multiple of 12"), ({"num_heads": 5}, "48 / 5"), ({"num_heads": 16}, "48 / 16"),
])
def test_wrong_widths_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **wrong)


# ---- cost ----

def test_flops_are_those_counted_at_xl_2():
    """As counted in the released code, which projects all 200 tokens of a 100-token caption: 1.2 GFLOP more."""
    assert flops(XL_2, 16, 18, 32, L=100) / 1e9 == pytest.approx(3177 - 1.2, abs=0.5)
    assert flops(XL_2, 16, 30, 52, L=100) / 1e9 == pytest.approx(8773 - 1.2, abs=0.5)
    no_mlp = flops(replace(XL_2, mlp_ratio=0), 16, 18, 32, L=100)
    assert 1 - no_mlp / flops(XL_2, 16, 18, 32, L=100) == pytest.approx(0.43, abs=0.005)
    assert flops(XL_2, 16, 18, 31, L=100, B=2) == 2 * flops(XL_2, 16, 18, 32, L=100), "31 columns are padded to 32"


def test_flops_are_those_torch_counts():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    config, C = replace(SMALL, patch_size=(1, 2, 2)), 48
    args = inputs(config, B=1, T=4, h=15, w=16, L=9)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):   # it sees no other
        STDiT(config)(**args)
    vectors = 2 * (3 * (256 + C) * C + 3 * (256 + C // 3) * C // 3 + 9 * C * C)     # time and sizes: not in flops()
    assert flops(config, 4, 15, 16, L=9) == counter.get_total_flops() - vectors


def test_default_config_is_xl_2():
    assert XL_2 == STDiTConfig()
