"""Which part of a checkpoint is read: the moving average, wherever and under whatever names public code writes it.

In every file here the averaged weights differ from the raw ones in every tensor that is trained, so that a mix-up shows.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from state_dicts import same

from harness.cli.weights import command
from harness.errors import UserError
from harness.weights.entries import ITSELF
from harness.weights.load import load_into
from harness.weights.transfer import export_file, import_file, inspect_file

FIXED = "pos_embed"  # not trained: objects that average may leave it out


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def trained(state):
    return {name: tensor for name, tensor in state.items() if name != FIXED}


def without_dots(state, stem=""):
    return {stem + name.replace(".", ""): tensor for name, tensor in trained(state).items()}


LAYOUTS = {  # what public code saves -> (raw, average) as a file, and the entry that is read
    # DiT, SiT, LightningDiT
    "ema": (lambda r, a: {"model": r, "ema": a, "opt": {}}, "ema"),
    # tutorials' EMA classes: only what is trained
    "ema.shadow": (
        lambda r, a: {"model": r, "ema": {"decay": 0.999, "shadow": trained(a), "backup": {}}},
        "ema.shadow",
    ),
    "shadow in a tensor's company": (
        lambda r, a: {"model": r, "ema": {"decay": torch.tensor(0.999), "shadow": a}},
        "ema.shadow",
    ),
    # MAR, JiT
    "model_ema": (lambda r, a: {"model": r, "model_ema": a, "epoch": 3}, "model_ema"),
    "ema_model": (lambda r, a: {"model": r, "ema_model": a}, "ema_model"),
    # timm
    "state_dict_ema": (lambda r, a: {"state_dict": r, "state_dict_ema": a, "arch": "dit"}, "state_dict_ema"),
    "ema beside state_dict": (lambda r, a: {"state_dict": r, "ema": a}, "ema"),
    # BasicSR
    "params_ema": (lambda r, a: {"params": r, "params_ema": a}, "params_ema"),
    "g_ema": (lambda r, a: {"g": r, "g_ema": a, "g_optim": {"state": {0: {"exp_avg": r["pos_embed"]}}}}, "g_ema"),
    # timm's ModelEma, and DistributedDataParallel in it
    "ema.module": (lambda r, a: {"model": r, "ema": {"module": a, "decay": 0.9}}, "ema.module"),
    "ema.module.module": (lambda r, a: {"model": r, "ema": prefixed("module.", a)}, "ema"),
    # torch.optim.swa_utils.AveragedModel
    "AveragedModel": (
        lambda r, a: {"model": r, "averaged": {"n_averaged": torch.tensor(5), **prefixed("module.", a)}},
        "averaged",
    ),
    "AveragedModel without a name": (
        lambda r, a: {"net": r, "net2": {"n_averaged": torch.tensor(5), **prefixed("module.", a)}},
        "net2",
    ),
    # ema-pytorch, in the trainer of denoising-diffusion-pytorch
    "ema-pytorch": (
        lambda r, a: {
            "step": 5,
            "model": prefixed("model.", r),
            "ema": {
                "initted": torch.tensor(True),
                "step": torch.tensor(5),
                **prefixed("online_model.model.", r),
                **prefixed("ema_model.model.", a),
            },
        },
        "ema.ema_model.model",
    ),
    # torch_ema, score_sde and diffusers' EMAModel: lists in the order of the parameters
    "shadow_params": (
        lambda r, a: {"model": r, "ema": {"decay": 0.99, "num_updates": 5, "shadow_params": list(trained(a).values())}},
        "ema.shadow_params",
    ),
    "all shadow_params": (
        lambda r, a: {
            "model": r,
            "ema": {"shadow_params": list(a.values()), "collected_params": [each * 0 for each in a.values()]},
        },
        "ema.shadow_params",
    ),
    # list(ema.named_parameters())
    "pairs": (lambda r, a: {"model": r, "ema": list(trained(a).items())}, "ema"),
    "tuple of pairs": (lambda r, a: {"model": r, "ema": {"params": tuple(a.items())}}, "ema.params"),
    "tuple of params": (lambda r, a: {"model": r, "ema": tuple(a.values())}, "ema"),
    # Lightning: LDM's LitEma, and modules that hold both networks
    "LitEma": (
        lambda r, a: {
            "state_dict": {
                **prefixed("model.", r),
                **without_dots(a, "model_ema."),
                "model_ema.decay": torch.tensor(0.99),
                "model_ema.num_updates": torch.tensor(7),
            }
        },
        "state_dict.model_ema",
    ),
    "LitEma of a wrapper": (
        lambda r, a: {
            "state_dict": {
                **prefixed("model.diffusion_model.", r),
                **without_dots(a, "model_ema.diffusion_model"),
            }
        },
        "state_dict.model_ema",
    ),
    "LitEma alone": (lambda r, a: {"model": r, "ema": {"decay": torch.tensor(0.9), **without_dots(a)}}, "ema"),
    "Lightning module": (
        lambda r, a: {"state_dict": {**prefixed("denoiser.", r), **prefixed("ema_denoiser.", a), "vae.x": r[FIXED]}},
        "state_dict.ema_denoiser",
    ),
    "Lightning callback": (
        lambda r, a: {
            "state_dict": prefixed("net.", r),
            "callbacks": {"EMA{'decay': 0.99}": {"ema_state_dict": prefixed("net.", a)}},
        },
        "callbacks.EMA{'decay': 0.99}.ema_state_dict.net",
    ),
    # averages beside names without a prefix: LitEma of a module that is the network, and a module that is and averages it
    "LitEma beside plain names": (
        lambda r, a: {"state_dict": {**r, **without_dots(a, "model_ema."), "model_ema.decay": torch.tensor(0.99)}},
        "state_dict.model_ema",
    ),
    "flat LitEma": (lambda r, a: {**r, **without_dots(a, "model_ema.")}, "model_ema"),
    "ema. beside plain names": (lambda r, a: {"state_dict": {**r, **prefixed("ema.", a)}}, "state_dict.ema"),
    "ema_model.module. beside plain names": (
        lambda r, a: {**r, **prefixed("ema_model.module.", a)},
        "ema_model.module",
    ),
    "two groups": (
        lambda r, a: {**r, **prefixed("ema.", a), "teacher_ema.stranger": torch.ones(2)},
        "ema",
    ),
    # one flat dictionary, as a safetensors file must be
    "flat": (lambda r, a: {**prefixed("model.", r), **prefixed("ema.", a)}, "ema"),
    "flat and wrapped": (
        lambda r, a: {**prefixed("net.module.", r), **prefixed("net_ema.module.", a)},
        "net_ema.module",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_moving_average_is_read_wherever_it_is(name, state, average, spec, tmp_path):
    make, entry = LAYOUTS[name]
    path = tmp_path / "a.pt"
    torch.save(make(state, average), path)
    net = spec.build(num_classes=10)
    provenance = load_into(net, path, spec)
    same(net.state_dict(), average)
    assert provenance.entry == entry
    assert any("moving average" in note and entry in note for note in provenance.notes)
    written, about = import_file(path)
    same(load_file(written), average)
    assert any(entry in note for note in about["notes"])
    document = inspect_file(path)
    assert document["fits"] and document["entry"] == entry and document["other_entries"]
    raw = inspect_file(path, entry=document["other_entries"][0])
    assert raw["fits"] and (raw["entry"] or ITSELF) == document["other_entries"][0]
    load_into(net, path, spec, entry=document["other_entries"][0])
    same(net.state_dict(), state)


RAW = {  # files without an average: the raw weights, under the entry
    "model": (lambda r: {"model": r, "ema": None}, "model"),
    "an average that was off": (lambda r: {"model": r, "ema": {}, "use_ema": False, "ema_decay": 0.9}, "model"),
    "module of DeepSpeed": (lambda r: {"module": r, "optimizer": {"state": {0: {"exp_avg": r[FIXED]}}}}, "module"),
    "deep": (lambda r: {"a": {"b": {"net": r}}}, "a.b.net"),
    "Lightning": (lambda r: {"state_dict": prefixed("model.net.", r), "optimizer_states": []}, "state_dict.model.net"),
    "model. before names": (lambda r: prefixed("model.", r), "model"),
    "one network twice": (lambda r: {"model": r, "state_dict": r}, "model"),
    "average of another network": (
        lambda r: {"model": r, "vae_ema": {"conv.weight": torch.zeros(3, 3)}},
        "model",
    ),
    "a diffusers' non_ema": (lambda r: {"non_ema": r}, "non_ema"),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_weights_are_read_where_there_is_no_average(name, state, spec, tmp_path):
    make, entry = RAW[name]
    torch.save(make(state), tmp_path / "a.pt")
    net = spec.build(num_classes=10)
    provenance = load_into(net, tmp_path / "a.pt", spec)
    same(net.state_dict(), state)
    assert provenance.entry == entry and not any("moving average" in note for note in provenance.notes)
    same(load_file(import_file(tmp_path / "a.pt")[0]), state)


def inside(state, wrapper, at):
    return {
        ".".join([*parts[:at], wrapper, *parts[at:]]) if len(parts := name.split(".")) > at else name: tensor
        for name, tensor in state.items()
    }


WRAPPED = {
    "compiled blocks": lambda r: inside(r, "_orig_mod", 2),
    "FSDP": lambda r: prefixed("_fsdp_wrapped_module.", inside(r, "_fsdp_wrapped_module", 2)),
    "FSDP over checkpointing": lambda r: inside(inside(r, "_checkpoint_wrapped_module", 2), "_fsdp_wrapped_module", 2),
    "DDP over a Lightning module": lambda r: prefixed("module.model._orig_mod.", r),
    "Fabric": lambda r: prefixed("_forward_module.", r),
    "prefix and module": lambda r: prefixed("model.module.", r),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_wraps_a_network_is_dropped_at_any_place(name, state, spec, tmp_path):
    torch.save(WRAPPED[name](state), tmp_path / "a.pt")
    net = spec.build(num_classes=10)
    load_into(net, tmp_path / "a.pt", spec)
    same(net.state_dict(), state)
    same(load_file(import_file(tmp_path / "a.pt")[0]), state)


AMBIGUOUS = {
    "two averages": (lambda r, a: {"model": r, "model_ema1": a, "model_ema2": r}, "several moving averages", "model_ema1, model_ema2"),
    "two decays": (lambda r, a: {"ema": {"0.999": a, "0.9999": r}}, "several moving averages", "ema.0.999, ema.0.9999"),
    "two networks": (lambda r, a: {"student2": r, "teacher": a}, "several entries", "student2, teacher"),
    "two prefixes": (lambda r, a: {**prefixed("one.", r), **prefixed("two.", a)}, "several entries", "one, two"),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_where_two_fit_equally_the_user_chooses(name, state, average, spec, tmp_path):
    make, problem, names = AMBIGUOUS[name]
    path = tmp_path / "a.pt"
    torch.save(make(state, average), path)
    net = spec.build(num_classes=10)
    for action in (lambda: load_into(net, path, spec), lambda: import_file(path), lambda: inspect_file(path)):
        with pytest.raises(UserError, match=f"{problem}.*: {names}; choose one with --entry NAME"):
            action()
    entry = names.split(", ")[0]
    load_into(net, path, spec, entry=entry)
    holds_average = name in ("two averages", "two decays")
    same(net.state_dict(), average if holds_average else state)
    same(load_file(import_file(path, entry=entry)[0]), average if holds_average else state)
    with pytest.raises(UserError, match=rf"a.pt has no entry 'stranger'; it has .*{names}"):
        load_into(net, path, spec, entry="stranger")


class Averager:
    def __init__(self, shadow):
        self.shadow = shadow


UNREADABLE = {
    "too few": lambda r, a: {"model": r, "ema": {"shadow_params": list(a.values())[:-5]}},
    "another order": lambda r, a: {"model": r, "ema": {"shadow_params": list(a.values())[::-1]}},
    "other names": lambda r, a: {"model": r, "ema": {f"p{n}": each for n, each in enumerate(a.values())}},
    "an object": lambda r, a: {"model": r, "ema": Averager(a)},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_average_that_cannot_be_read_is_no_reason_for_the_raw_weights(name, state, average, spec, tmp_path):
    torch.save(UNREADABLE[name](state, average), tmp_path / "a.pt")
    net = spec.build(num_classes=10)
    with pytest.raises(UserError, match="holds a moving average, ema.*that cannot be read.*--entry model"):
        load_into(net, tmp_path / "a.pt", spec)
    load_into(net, tmp_path / "a.pt", spec, entry="model")
    same(net.state_dict(), state)


def test_a_list_is_matched_only_where_shapes_leave_no_choice(tmp_path):
    from harness.weights.entries import choose_entry

    def read(raw, averages):
        torch.save({"model": raw, "ema": averages}, tmp_path / "a.pt")
        from harness.weights.containers import open_file

        entry, _ = choose_entry(open_file(tmp_path / "a.pt").value, tmp_path / "a.pt")
        return {name: tensor.read().tolist() for name, tensor in entry.tensors.items()}

    raw = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(2)}
    assert read(raw, [torch.ones(2), torch.ones(2)])["b"] == [0, 0, 0]  # only b can be the one that is left out
    with pytest.raises(UserError, match="cannot be read"):
        read({"a": torch.zeros(2), "b": torch.zeros(2)}, [torch.ones(2)])
    tied = torch.zeros(2)
    assert read({"a": tied, "b": torch.zeros(3), "c": tied}, [torch.ones(2), torch.ones(3)])["c"] == [1, 1]


def test_the_commands_say_and_choose_the_entry(state, average, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": state, "ema": {"decay": 0.9, "shadow": average}}, path)

    def run(*words):
        return CliRunner().invoke(command, [str(word) for word in words])

    text = run("inspect", path).output
    assert "entry       ema.shadow" in text and "or --entry  model" in text
    assert "its moving average ('ema.shadow'; beside it: model)" in text
    assert json.loads(run("inspect", path, "--entry", "model", "--json").output)["entry"] == "model"
    assert "moving average ('ema.shadow'" in run("import", path, "--out", tmp_path / "average.safetensors").output
    run("import", path, "--entry", "model", "--out", tmp_path / "raw.safetensors")
    same(load_file(tmp_path / "average.safetensors"), average)
    same(load_file(tmp_path / "raw.safetensors"), state)
    run("export", path, "--entry", "model", "--format", "dit", "--out", tmp_path / "raw.pt")
    same(torch.load(tmp_path / "raw.pt"), state)


# A label table without the null label ---------------------------------------------------------------------------------


def test_a_table_without_a_null_row_is_read_and_stays_so(state, spec, tmp_path):
    table = "y_embedder.embedding_table.weight"
    bare = {**state, table: state[table][:-1]}
    torch.save({"ema": bare}, tmp_path / "a.pt")
    net = spec.build(num_classes=10)
    provenance = load_into(net, tmp_path / "a.pt", spec)
    assert provenance.null_row_is_made and any("no row for the null label" in note for note in provenance.notes)
    same(net.state_dict(), {**bare, table: torch.cat([bare[table], torch.zeros(1, 192)])})
    thousand = {**state, table: torch.randn(1000, 192)}
    torch.save(thousand, tmp_path / "b.pt")
    document = inspect_file(tmp_path / "b.pt")
    assert document["fits"] and document["arguments"] == {}, "1000 classes, as usual, and not 999"
    assert any("no row for the null label" in note for note in document["notes"])
    written, _ = import_file(tmp_path / "b.pt")
    same(load_file(written), thousand)
    assert load_into(spec.build(), written, spec).null_row_is_made
    same(torch.load(export_file(written, "dit")), thousand)
    with pytest.raises(UserError, match="no row for the null label, which diffusers' network has"):
        export_file(written, "diffusers")
    assert not load_into(net, _saved(state, tmp_path / "c.pt"), spec).null_row_is_made


def _saved(state, path):
    torch.save(state, path)
    return path


def test_a_plug_in_network_is_found_under_any_prefix(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    raw = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    ones = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": {**prefixed("net.", raw), **prefixed("ema_net.", ones)}}, tmp_path / "a.pt")
    assert load_into(net, tmp_path / "a.pt").entry == "state_dict.ema_net"
    same(net.state_dict(), ones)


def test_a_module_whose_name_is_an_averages_is_raw(tmp_path):
    """A network's own avg_head.* makes no moving average of its raw weights, and is part of the average beside them."""
    from harness.weights.containers import open_file
    from harness.weights.entries import choose_entry

    raw = {name: torch.randn(n, 3) for n, name in enumerate(("a.w", "b.w", "c.w", "avg_head.w", "avg_head.b"), 2)}
    for state, name, averaged in ((raw, "", False), ({**raw, **prefixed("ema.", raw)}, "ema", True)):
        path = tmp_path / "a.pt"
        torch.save(state, path)
        entry, entries = choose_entry(open_file(path).value, path, [tuple(raw)])
        assert (entry.name, entry.averaged, entry.tensors.keys()) == (name, averaged, raw.keys())
        assert [each.name for each in entries if each.averaged] == ["ema"] * averaged
