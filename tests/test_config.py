"""YAML and overrides into dataclasses, and what a person reads when they do not fit."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.config import load, rebuild, to_plain
from spct_ray.errors import ConfigError


@dataclass(frozen=True)
class Source:
    path: str
    kind: Literal["jsonl", "parquet"] = "jsonl"


@dataclass(frozen=True)
class Optim:
    lr: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int | None = None
    fused: bool = False


@dataclass(frozen=True)
class Grpo:
    beta: float = 0.08
    optim: Optim = field(default_factory=Optim)
    ks: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if not self.ks:
            raise ValueError("ks is empty; name at least one k")


@dataclass(frozen=True)
class Recipe:
    root: str
    grpo: Grpo = field(default_factory=Grpo)
    sources: tuple[Source, ...] = ()
    meta: Optim | None = None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("root: runs/x\ngrpo: {beta: 0.1, optim: {lr: 1e-6}}\nsources: [{path: a.jsonl}]\n")
    return path


def test_files_and_overrides_become_dataclasses(file: Path) -> None:
    overrides = [
        "grpo.ks=[1,2,4]",
        "grpo.optim.warmup=10",
        "meta.lr=1",
        "sources.0.kind=parquet",
        "root=${oc.env:HOME}/${grpo.beta}",
    ]
    recipe = load(Recipe, str(file), overrides)
    assert recipe.root == f"{Path.home()}/0.1"
    assert recipe.grpo == Grpo(beta=0.1, optim=Optim(lr=1e-6, warmup=10), ks=(1, 2, 4))
    assert recipe.sources == (Source("a.jsonl", "parquet"),)
    assert recipe.meta == Optim(lr=1.0)
    assert isinstance(recipe.meta.lr, float)
    assert load(Recipe, str(file)).root == "runs/x"
    assert load(Recipe, str(file), ["meta.lr=1", "meta=null"]).meta is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.betta=1", r"override 'grpo.betta=1': grpo.betta: unknown key; did you mean 'grpo.beta'\?"),
        ("grpo.zzz=1", "known keys: beta, optim, ks"),
        (
            "sources.0.pth=b",
            "override 'sources.0.pth=b': sources.0.pth: unknown key; did you mean 'sources.0.path'",
        ),
        ("sources.0.kind=csv", r"sources.0.kind: 'csv' is not one of 'jsonl', 'parquet'"),
        ("grpo.beta=high", "grpo.beta: expected a number, found 'high'"),
        ("grpo.beta=true", "grpo.beta: expected a number, found True"),
        ("grpo.optim.warmup=1.5", "grpo.optim.warmup: expected an integer, found 1.5"),
        ("grpo.optim.fused=1", "grpo.optim.fused: expected true or false, found 1"),
        ("grpo.optim.betas=3", r"grpo.optim.betas: expected a list such as \[1, 2\], found 3"),
        ("grpo.optim.betas=[1]", "grpo.optim.betas.1: missing"),
        ("grpo.ks=[1,b]", r"grpo.ks.1: expected an integer, found 'b'"),
        ("grpo.ks=[]", "grpo: ks is empty"),
        ("grpo=3", "grpo: expected `key: value` lines, found 3"),
        ("grpo.optim.lr=null", "grpo.optim.lr: expected a number, found None"),
        ("root=12", "root: expected text, found 12; write it in quotes"),
        ("meta.lr=x", "meta.lr: expected a number"),
        ("grpo.beta", "write it as key=value"),
        ("root=${nowhere}", "root: Interpolation key 'nowhere' not found"),
    ],
)
def test_what_does_not_fit_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Recipe, str(file), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grpo: {beta: 1}", "root: missing"),
        ("root: x\nroute: y", r"route: unknown key; did you mean 'root'\?"),
        ("- 1", "expected `key: value` lines at the top"),
        ("a: {b: 1\nc", "not valid YAML"),
        ("", "root: missing"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{path}: .*{message}"):
        load(Recipe, str(path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(Recipe, str(tmp_path / "none.yaml"))


plain: Any = st.builds(
    Recipe,
    root=st.text(st.characters(codec="utf-8", exclude_characters="$\\", categories=("L", "N")), max_size=8),
    grpo=st.builds(
        Grpo,
        beta=st.floats(allow_nan=False, allow_infinity=False),
        ks=st.lists(st.integers(), min_size=1).map(tuple),
        optim=st.builds(Optim, warmup=st.none() | st.integers(), fused=st.booleans()),
    ),
    sources=st.lists(st.builds(Source, path=st.just("p"), kind=st.sampled_from(["jsonl", "parquet"]))).map(tuple),
    meta=st.none() | st.builds(Optim, lr=st.floats(0, 1)),
)


class Quoted(yaml.SafeDumper):
    """Texts in quotes: PyYAML leaves 0E0 without, which OmegaConf reads as a number."""


Quoted.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


@given(plain)
def test_a_written_or_stored_config_loads_as_itself(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.mktemp("config") / "r.yaml"
    path.write_text(yaml.dump(to_plain(recipe), Dumper=Quoted))
    assert load(Recipe, str(path)) == recipe
    assert rebuild(Recipe, to_plain(recipe), "x") == recipe


def test_a_stored_config_of_another_version_says_file_field_and_what_to_do() -> None:
    assert rebuild(Recipe, {"root": "x", "grpo": {"ks": [3]}}, "r") == Recipe("x", Grpo(ks=(3,)))  # new fields
    with pytest.raises(
        ConfigError, match=r"^steps/a/record\.json: config\.grpo\.betta: unknown key; did you mean 'grpo\.beta'"
    ) as no:
        rebuild(Recipe, {"root": "x", "grpo": {"betta": 1}}, "steps/a/record.json: config")
    assert "spct run" in str(no.value)


def test_every_problem_is_named_in_one_message(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'sources.0.pth=b': .*\n?.*") as no:
        load(Recipe, str(file), ["sources.0.pth=b", "grpo.beta=x"])
    assert "override 'grpo.beta=x': grpo.beta: expected a number" in str(no.value)


def test_a_section_given_in_part_keeps_the_rest_of_its_own_default(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Stage:
        optim: Optim = field(default_factory=lambda: Optim(lr=1.0, fused=True))

    @dataclass(frozen=True)
    class Run:
        stage: Stage = field(default_factory=lambda: Stage(Optim(lr=2.0, warmup=7)))

    path = tmp_path / "run.yaml"
    path.write_text("stage: {optim: {warmup: 3}}")
    assert load(Run, str(path)) == Run(Stage(Optim(lr=2.0, warmup=3)))
    path.write_text("stage: {}")
    assert load(Run, str(path)) == Run()


def test_a_file_says_what_differs_from_its_base(tmp_path: Path, file: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "middle.yaml").write_text("base: recipe.yaml\ngrpo: {ks: [4], optim: {lr: 2e-6}}\nsources: []\n")
    top = tmp_path / "deep" / "top.yaml"
    top.write_text("base: ../middle.yaml\nroot: runs/top\ngrpo: {optim: {fused: true}}\n")
    optim = Optim(lr=2e-6, fused=True)
    assert load(Recipe, str(top), ["grpo.beta=1"]) == Recipe("runs/top", Grpo(1.0, optim, (4,)))
    other = tmp_path / "other.yaml"  # the same differences, from another base
    other.write_text("root: runs/other\nsources: []\ngrpo: {beta: 2.0, ks: [5]}\n")
    assert load(Recipe, str(top), [f"base={other}"]) == Recipe("runs/top", Grpo(2.0, Optim(fused=True), (5,)))
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such configuration file \(the base of .*top\.yaml\)"):
        load(Recipe, str(top), ["base=gone.yaml"])
    for text, message in (
        ("base: none.yaml", r"none\.yaml: no such configuration file \(the base of .*top\.yaml\)"),
        ("base: [a, b]", "base: expected the path of a configuration file"),
        ("base: ../loop.yaml", "is a base of itself"),
        ("base: ../recipe.yaml\ngrpo: {betta: 1}", r"top\.yaml: grpo\.betta: unknown key"),
    ):
        (tmp_path / "loop.yaml").write_text("base: deep/top.yaml")
        top.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load(Recipe, str(top))
