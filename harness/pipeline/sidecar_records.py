"""The evaluation stage: from samples.npz to records.

A sample set that carries its sidecar says itself what it is; one from elsewhere is measured under the name it is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import registry
from harness.compute import TRAINING_FACTOR
from harness.errors import UserError
from harness.images.open import open_images
from harness.io import files
from harness.runs.samples import read_sidecar, sidecar_path
from results.records import Sampling, Training


def samples_sha256(path: Path) -> str:
    """Of a file its bytes, of a folder or a pattern the images."""
    return files.sha256_file(path) if path.is_file() else open_images(path).sha256()


def fields_from_sidecar(path: Path, sha256: str, name: str | None) -> dict[str, Any]:
    """What the sidecar of the samples at `path` (with hash `sha256`) says of the system behind them, as record fields.

    A sidecar of other samples is refused.
    """
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        sampling = Sampling(samples_sha256=sha256)
        return {"system": name or path.stem, "sampling": sampling}
    data = read_sidecar(path)
    if data.get("sha256") != sha256:
        raise UserError(f"{path} is not the file that {sidecar} describes (its hash differs); put the right one back")
    try:
        if "system" in data["identity"]:
            return _describe_system(data, sha256, name)
        identity, run = data["identity"], data["identity"]["run"]
        drawn, recipe, compute, trained = identity["sampling"], run["recipe"], data["compute"], data["trained"]
        return {
            "system": name or run["backbone"],
            "backbone": run["backbone"],
            "kind": "denoiser",
            "framework": run["framework"],
            "params": compute["params"],
            "gflops": compute["gflops"],
            "gflops_published_input": compute["gflops_published_input"],
            "training": Training(
                steps=identity["training_steps"],
                images=identity["training_steps"] * recipe["batch"],
                gflops=compute["gflops"] * identity["training_steps"] * recipe["batch"] * TRAINING_FACTOR,
                batch=recipe["batch"],
                learning_rate=recipe["learning_rate"],
                ema_decay=recipe["ema_decay"],
                seed=run["seed"],
                objective=recipe["objective"],
                schedule=recipe["schedule"],
                precision=trained["precision"],
                micro_batch=trained["micro_batch"],
                recipe_hash=files.sha256_json(recipe),
                checkpoint_sha256=identity["checkpoint_sha256"],
            ),
            "sampling": Sampling(
                sampler=drawn["sampler"],
                steps=drawn["steps"],
                evaluations=data["evaluations"],
                eta=drawn["eta"],
                guidance_scale=drawn["guidance_scale"],
                guidance_channels=drawn["guidance_channels"],
                gflops_per_image=compute["gflops"] * data["evaluations"],
                **_decoding(identity.get("decoder"), compute),
                uint8_rule=drawn["uint8_rule"],
                label_policy=drawn["label_policy"],
                clip_denoised=drawn["clip_denoised"],
                precision=drawn["precision"],
                batch=identity["batch"],
                seed=drawn["seed"],
                samples_sha256=sha256,
            ),
        }
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{sidecar} does not say how the samples were made ({error}); give --name and move it away"
        ) from error


def _decoding(decoder: dict[str, Any] | None, compute: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the decoder of a run in latents; a name alone does not say which weights it had."""
    if decoder is None:
        return {}
    return {
        "decoder": decoder["name"],
        "decoder_gflops": compute["decoder_gflops"],
        "settings_hash": files.sha256_json({"decoder": decoder}),
    }


def _describe_system(data: dict[str, Any], sha256: str, name: str | None) -> dict[str, Any]:
    """The same for a sample set of a system."""
    identity, compute = data["identity"], data["compute"]
    system, weights, drawn = identity["system"], identity["weights"], identity["sampling"]
    base, decoder = system["base"], identity["decoder"]
    parts = {"base": base, "classifier": system["classifier"]}
    for number, stage in enumerate(system["upsamplers"], start=1):
        parts["upsampler" if number == 1 else f"upsampler-{number}"] = stage
    generator = registry.backbones.get(base["backbone"]).kind == "generator"
    hashes = sorted((part, source["sha256"]) for part, source in weights.items())
    return {
        "system": name or system["name"],
        "backbone": "+".join(part["backbone"] for part in parts.values() if part is not None),
        "kind": "generator" if generator else "denoiser",
        "framework": drawn.get("framework", "torch"),
        "params": compute["params"],
        "gflops": compute["gflops"],
        "training": _training_of_parts(parts, weights, files.sha256_json(hashes)),
        "sampling": Sampling(
            sampler=None if generator else base["sampler"],
            steps=None if generator else base["steps"],
            evaluations=data["evaluations"],
            eta=None if generator or base["sampler"] == "ddpm" else base["eta"],
            **_guidance(system),
            gflops_per_image=compute["gflops_per_image"],
            decoder=None if decoder is None else decoder["name"],
            decoder_gflops=compute["decoder_gflops"],
            uint8_rule=drawn["uint8_rule"],
            label_policy=drawn["label_policy"],
            clip_denoised=None if generator else base["clip_denoised"],
            precision=drawn["precision"],
            batch=identity["batch"],
            seed=drawn["seed"],
            stage_steps=_stage_steps(system),
            settings=_settings(system),
            settings_hash=_settings_hash(system, decoder),
            samples_sha256=sha256,
        ),
    }


def _stage_steps(system: dict[str, Any]) -> str | None:
    """Steps of all stages where there are several."""
    stages = (system["base"], *system["upsamplers"])
    return " + ".join(str(stage["steps"]) for stage in stages) if len(stages) > 1 else None


def _settings(system: dict[str, Any]) -> str | None:
    """In words, what the columns of a table, which speak of the base, leave out of a system of several networks."""
    words = []
    for stage in system["upsamplers"]:
        eta = f", eta {stage['eta']:g}" if stage["sampler"] != "ddpm" else ""
        noise = f", conditioning noise {stage['conditioning_noise']:g}" if stage["conditioning_noise"] else ""
        words.append(f"{stage['backbone']} by {stage['sampler']}{eta}{noise}")
    if system["classifier"] is not None and system["base"]["guidance_scale"] != 1:
        words.append(f"guided by {system['classifier']['backbone']} too, scale {system['classifier']['scale']:g}")
    return "; ".join(words) or None


def _settings_hash(system: dict[str, Any], decoder: dict[str, Any] | None) -> str:
    """Of what a system's rows differ in beside their columns: all settings of all parts, without name and steps."""
    stages = [{**stage, "steps": None} for stage in (system["base"], *system["upsamplers"])]
    rest = {name: value for name, value in system.items() if name not in ("name", "base", "upsamplers")}
    return files.sha256_json({"stages": stages, "system": rest, "decoder": decoder})


def _guidance(system: dict[str, Any]) -> dict[str, Any]:
    """Classifier-free guidance, or a classifier's with its scale; one of them, for a record has one scale."""
    base, classifier = system["base"], system["classifier"]
    if classifier is not None and base["guidance_scale"] == 1:
        return {"guidance_scale": classifier["scale"], "guidance_channels": "classifier"}
    guided = base["guidance_scale"] != 1
    return {
        "guidance_scale": base["guidance_scale"],
        "guidance_channels": base["guidance_channels"] if guided else None,
    }


def _training_of_parts(parts: dict[str, Any], weights: dict[str, Any], checkpoint: str) -> Training:
    """What is known of the training: steps and images of the base, compute of all parts if all are runs."""
    base = weights["base"]["run"]
    if base is None:
        return Training(checkpoint_sha256=checkpoint)
    gflops: float | None = 0.0
    for part, source in weights.items():
        if source["run"] is None:
            gflops = None
            break
        spec = registry.backbones.get(parts[part]["backbone"])
        images = source["training_steps"] * source["run"]["recipe"]["batch"]
        gflops += spec.count(**parts[part]["arguments"]).gflops * images * TRAINING_FACTOR
    recipe, steps = base["recipe"], weights["base"]["training_steps"]
    return Training(
        steps=steps,
        images=steps * recipe["batch"],
        gflops=gflops,
        batch=recipe["batch"],
        learning_rate=recipe["learning_rate"],
        ema_decay=recipe["ema_decay"],
        seed=base["seed"],
        objective=recipe["objective"],
        schedule=recipe["schedule"],
        recipe_hash=files.sha256_json(recipe),
        checkpoint_sha256=checkpoint,
    )
