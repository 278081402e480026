"""Models and data sets of the Hugging Face Hub by name, as local paths: `hf:Qwen/Qwen2.5-0.5B`, `hf:openai/gsm8k`."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from r1engine.config import StageConfig
from r1engine.config.data_files import HUB, is_on_hub

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
PARQUET = "refs/convert/parquet"  # where the Hub keeps every public data set: config/split/*.parquet
USUAL = ("main", "default")  # configurations of a data set that are taken where none is named
ConfigT = TypeVar("ConfigT", bound=StageConfig)


def fetched(cfg: ConfigT) -> ConfigT:
    """The configuration with what it names on the Hub in place, downloaded to the Hub's cache or found there.

    Raises:
        ValueError: there is no such model or data set, it may not be read, or there is no network; the key is named.
    """
    model, data = cfg.model, cfg.data
    if model.path is not None and is_on_hub(model.path):
        model = model.model_copy(update={"path": _of_key("model.path", str(model.path), "model")})
    paths = {"train": data.train, "heldout": data.heldout}
    on_hub = {name: path for name, path in paths.items() if isinstance(path, Path) and is_on_hub(path)}
    if on_hub:
        local = {name: _of_key(f"data.{name}", str(path), "data") for name, path in on_hub.items()}
        data = data.model_copy(update=local)
    return cfg.model_copy(update={"model": model, "data": data})


def _of_key(key: str, name: str, what: str) -> Path:
    try:
        return local_path(name, key, what)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def local_path(name: str, key: str, what: str) -> Path:
    """The folder of a model or data set that a pipeline names.

    Args:
        name: as of `model_folder` or `data_folder`.
        key:  of the configuration; held-out data is the split test, other data train.
        what: "model" or "data".

    Raises:
        ValueError: there is no such model or data set, it may not be read, or there is no network.
    """
    if what == "model":
        return model_folder(Path(name))
    return data_folder(Path(name), "test" if key == "data.heldout" else "train")


def model_folder(path: Path) -> Path:
    """The folder of a model `hf:OWNER/NAME[@REVISION]`. Errors as of `local_path`."""
    name, _, revision = str(path).removeprefix(HUB).partition("@")
    return _snapshot(name, "model", revision or None, MODEL_FILES)


def data_folder(path: Path, split: str) -> Path:
    """The folder with the Parquet files of a split of `hf:OWNER/NAME[/CONFIG][:SPLIT]`. Errors as of `local_path`.

    Args:
        path:  as above; without CONFIG the only one, or the one called main or default.
        split: where none is named.
    """
    name, _, named = str(path).removeprefix(HUB).partition(":")
    split = named or split
    owner, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    root = _snapshot(f"{owner}/{repository}", "dataset", PARQUET, [f"{config or '*'}/{split}/*.parquet"])
    found = {folder.parent.name: folder for folder in sorted(root.glob(f"{config or '*'}/{split}")) if folder.is_dir()}
    if not found:
        raise ValueError(f"found no split '{split}' in {path}, required hf:OWNER/NAME[/CONFIG][:SPLIT]")
    usual = [name for name in USUAL if name in found]
    if len(found) > 1 and not usual:
        raise ValueError(f"found the configurations {', '.join(found)} in {path}, required one: {path}/NAME")
    return found[usual[0]] if usual else next(iter(found.values()))


def _snapshot(name: str, kind: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    if name.count("/") != 1:
        raise ValueError(f"found {HUB}{name}, required {HUB}OWNER/NAME")
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the library, its HTTP client and the file system, which differ between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"cannot fetch the {kind} {name} from the Hugging Face Hub: {reason}; without a network download it "
            "elsewhere and give the local path"
        ) from error
