"""What a run records of itself is named when it is damaged, and nothing is made up in its place."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nnx_fit.cli import main, record_files
from nnx_fit.errors import ConfigurationError


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b"seed: 5\ntrainer:\n  max_ep", "it is cut off"),
        (b"\0" * 40 + b"\n", "it is no YAML"),
        (b"seed: 5\ndata: {a: [1\n", "it is no YAML from line 3 on"),
        (b"\xff\xfe\n", "it is no text"),
        (b"- a=1\n", "it holds something else"),
        (b"5\n", "it cannot be read"),
    ],
)
def test_damage_is_named_and_no_settings_are_made_up(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"{file} is damaged: {says}"):
        record_files.read_yaml(file)
    with pytest.raises(ConfigurationError, match="it cannot be read"):
        record_files.read_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize("name", ["config.yaml", "hydra.yaml", "resumed-1/config.yaml", "resumed-1/hydra.yaml"])
def test_resume_and_evaluations_name_the_file_in_a_few_lines(folder: Path, capsys, name: str) -> None:
    record = folder / "outputs/a/.hydra"
    (record / name).parent.mkdir(parents=True)
    for place in {record, (record / name).parent}:
        (place / "config.yaml").write_text("seed: 5\n")
        OmegaConf.save(OmegaConf.create({"hydra": {}}), place / "hydra.yaml")
    assert main.run(["resume", "outputs/a", "--cfg", "job"]) == 0
    (record / name).write_text("seed: 5\ntrai")
    for words in (["resume", "outputs/a"], ["test", "ckpt_path=outputs/a/checkpoints/last"]):
        capsys.readouterr()
        assert main.run(words) == 1
        said = capsys.readouterr().err
        assert f"ConfigurationError: {record / name} is damaged: it is cut off." in said
        assert "Traceback" not in said
        assert (f"remove the folder {record / 'resumed-1'}" in said) == name.startswith("resumed")
