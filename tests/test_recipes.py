"""Recipes: one format for single recipes, families and tables, and all of them are valid."""

import math
import re
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides
from torch import nn
from workspace import Project, start_warm, yaml_text

from secateur import cli
from secateur.base import plugin, sections, settings
from secateur.base.errors import SecateurError, SettingsError
from secateur.pipeline import params_file, recipe
from secateur.training.penalty import TrainingPlan

PARAMS = yaml.safe_load(Path("params.yaml").read_text())
RECIPES = recipe.read_recipes()
"""All recipes, read once: there are hundreds of tests of them."""
NAMES = RECIPES.names
PENALTIES = {n: RECIPES.recipe(n).settings.get("penalty") for n in NAMES}
GROWING = [n for n in NAMES if PENALTIES[n] in ("greg1", "greg2")]
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167, "digits": 1_293,
                   "mnist": 54_000, "image_folder": 45_000}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_on_top_of_params_yaml_is_sound(name, tmp_path):
    made = RECIPES.recipe(name)
    path = tmp_path / "params.yaml"
    path.write_text(yaml_text(settings.merged(PARAMS, made.settings)))
    settings.check(path)
    assert made.about and "{" not in made.about


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_changes_only_keys_that_there_are(name):
    made = RECIPES.recipe(name)
    for key in recipe.changes(made.settings, PARAMS):
        *sections, last = key.split(".")
        table = PARAMS
        for section in sections:
            table = table[section]
        assert last in table or sections == ["rounds"], key


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_penalty_fits_into_the_epochs_that_a_recipe_gives_it(name):
    made = settings.merged(PARAMS, RECIPES.recipe(name).settings)
    module = plugin.load("penalties", made["penalty"])
    written = made["penalties"][made["penalty"]] | {"ratios": 0.5, "skip": []}
    own = settings.validate(module.Settings, written, "")
    penalty = module.build(own, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), made["decay"])
    training = made["sparse_train"]
    steps = math.ceil(TRAINING_IMAGES[made["dataset"]] / training["batch_size"])
    assert penalty.max_steps <= training["epochs"] * steps
    assert training["keep"] == "last"
    assert made["pruner"] == "chosen"


STEPPING = [n for n in NAMES if PENALTIES[n] in ("gradual", "rigl", "gsm")]


@pytest.mark.parametrize("name", STEPPING)
def test_a_penalty_that_prunes_meanwhile_suits_the_training_that_a_recipe_gives_it(name):
    made = settings.merged(PARAMS, RECIPES.recipe(name).settings)
    module = plugin.load("penalties", made["penalty"])
    own = settings.validate(module.Settings, made["penalties"][made["penalty"]], "")
    arch, shape = plugin.load("archs", made["arch"]), (1, 28, 28)
    widths = settings.validate(arch.Settings, made["archs"][made["arch"]], "")
    needs = {"shape": shape} if made["penalty"] == "gradual" else {}
    penalty = module.build(own, arch.build(widths, 10, shape), made["decay"], **needs)
    training = settings.validate(sections.SparseTrain, made["sparse_train"], "")
    images = TRAINING_IMAGES[made["dataset"]]
    steps = training.epochs * math.ceil(images / training.batch_size)
    penalty.start(TrainingPlan(training, steps, images))
    assert (training.keep, made["pruner"]) == ("last", "chosen")


PARAMETERS = {  # published for ten classes
    "dense-cifar10-alexnet": 2_472_266,
    "dense-cifar10-vgg19-bn": 20_040_522,
    "dense-cifar10-resnet110": 1_730_714,
    "dense-cifar10-resnet164": 1_704_154,
    "dense-cifar10-preresnet110": 1_730_522,
    "dense-cifar10-preresnet164": 1_703_258,
    "dense-cifar10-wrn-28-10": 36_479_194,
    "dense-cifar10-resnext29-8x64": 34_426_698,
    "dense-cifar10-resnext29-16x64": 68_155_210,
    "dense-cifar10-densenet-bc-100-12": 769_162,
    "dense-cifar10-densenet-bc-190-40": 25_624_430,
    "dense-imagenet-resnet18": 11_689_512,
    "gconv-dense-cifar10-densenet40": 1_019_722,
    "gconv-dense-cifar10-condensenet86": 1_959_626,
    "deephoyer-cifar10-resnet20-group-hs": 272_474,
    "deephoyer-cifar10-resnet18-hs": 11_173_962,
    "cifar10-jpeg-resnet20": 269_722,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_names_the_network_that_was_published(name):
    made = settings.merged(PARAMS, RECIPES.recipe(name).settings)
    module, own = plugin.load("archs", made["arch"]), made["archs"][made["arch"]]
    large = made["dataset"] == "imagenet"
    with torch.device("meta"):
        model = module.build(
            settings.validate(module.Settings, own, ""),
            1000 if large else 10,
            (3, 224, 224) if large else (3, 32, 32),
        )
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", [n for n in NAMES if re.match("(gconv-)?dense-", n)])
def test_a_dense_recipe_trains_nothing_but_the_dense_network(name):
    made = settings.merged(PARAMS, RECIPES.recipe(name).settings)
    assert made["sparse_train"]["epochs"] == made["finetune"]["epochs"] == 0
    assert (made["penalty"], made["pruners"]["threshold"]["sensitivity"]) == ("none", 0)
    assert made["baseline"]["keep"] == "last" and made["data"]["validation"] == 0


def test_overrides_are_what_dvc_takes():
    made = recipe.Recipe("x", "", {"a": {"b": 0.5, "c": True, "d": [0, "1.0"]}, "e": "std",
                                   "f": "0-15: 0.7, 3: 0", "g": None})  # fmt: skip
    assert made.overrides == [
        "-S", "a.b=0.5", "-S", "a.c=true", "-S", 'a.d=[0, "1.0"]', "-S", "e=std",
        "-S", 'f="0-15: 0.7, 3: 0"', "-S", "g=null",
    ]  # fmt: skip


def test_dvc_reads_the_overrides_as_the_values_of_the_recipe(tmp_path):
    """`apply_overrides` is what `dvc exp run -S` calls."""
    parts = [{"scale": 0.5, "until": 0.2}, {"scale": 0.75, "until": 0.6}]
    wanted = {
        "baseline": {"progressive_resizing": parts, "lr": 0.25, "average": {"kind": None}},
        "prune": {"remove_dead": False},
        "pruners": {
            "magnitude": {"ratios": "conv1: 0.5, layer1.*.conv2: 0", "target": {"macs": 0.5}}
        },
        "stages": [[], [[1, "a: b"], {"deep": [{"text": "true", "none": None}]}]],
    }
    file = tmp_path / "params.yaml"
    file.write_text(Path("params.yaml").read_text() + "stages: []\n")
    overrides = recipe.Recipe("x", "", wanted).overrides
    apply_overrides(file, [part for part in overrides if part != "-S"])
    assert yaml.safe_load(file.read_text()) == settings.merged(PARAMS, wanted)


def test_keys_with_dots_are_kept_whole():
    text = Path("params.yaml").read_text()
    own = {"baseline": {"rename": {"layer*.down": "layer*.shortcut"}, "epochs": 3}}
    for before in ({}, {"norm.weight": "norm.scale"}):
        text = params_file.updated(text, {"baseline.rename": before})
        changed = recipe.changes(own, yaml.safe_load(text))
        made = yaml.safe_load(params_file.updated(text, changed))["baseline"]
        assert made["rename"] == before | {"layer*.down": "layer*.shortcut"}
        assert made["epochs"] == 3


@pytest.mark.parametrize(
    "own",
    [
        {"archs": {"mine": {}}},  # a new plug-in with its defaults
        {"archs": {"mine": {"sizes": {}}}},
        {"pruners": {"a.b": 0.5, "threshold": {"sensitivity": 0.5}}},
    ],
)
def test_what_is_written_into_the_file_is_all_that_was_merged(own):
    text = Path("params.yaml").read_text()
    params = yaml.safe_load(text)
    changed = recipe.changes(own, params)
    assert yaml.safe_load(params_file.updated(text, changed)) == recipe.merged(params, own)


def test_a_table_in_the_place_of_a_plain_value_is_taken_whole():
    wanted = {"pruners": {"network_slimming": {"target": {"params": 0.5}, "ratio": 0.4}}}
    assert recipe.Recipe("x", "", wanted).overrides == [
        "-S", "pruners.network_slimming.target={params: 0.5}",
        "-S", "pruners.network_slimming.ratio=0.4",
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "FOLDER", tmp_path)

    def write(**files):
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    return write


def test_a_recipe_stands_on_another_and_changes_what_it_names(folder):
    folder(
        below={"about": "b", "base": True, "settings": {"x": 1, "t": {"u": 1, "v": [1, 2]}}},
        middle={"about": "m", "extends": "below", "settings": {"t": {"v": [3]}}},
        above={"about": "a", "extends": "middle", "settings": {"t": {"w": 4}, "x": 5}},
    )
    assert recipe.read_recipes().names == ["above", "middle"]
    assert recipe.load("middle").settings == {"x": 1, "t": {"u": 1, "v": [3]}}
    assert recipe.load("above").settings == {"x": 5, "t": {"u": 1, "v": [3], "w": 4}}
    assert recipe.load("above").about == "a"
    with pytest.raises(SettingsError, match=r"'below': there is none in .*lists all$"):
        recipe.load("below")


def test_a_table_is_a_recipe_for_every_combination(folder):
    folder(
        below={"about": "b", "base": True, "settings": {"z": 0, "p": {"q": 0}}},
        table={
            "about": "net {net} by {way}", "name": "n-{net}-{way}", "extends": "below",
            "settings": {"p": {"q": 1}},
            "table": {
                "net": {0.5: {"p": {"r": 1}}, 0.75: {"p": {"r": 2}}},
                "way": {"a": {"z": 1}, "b": {"p": {"q": 9}}},
            },
        },
    )  # fmt: skip
    assert recipe.read_recipes().names == ["n-0.5-a", "n-0.5-b", "n-0.75-a", "n-0.75-b"]
    assert recipe.load("n-0.5-a").settings == {"z": 1, "p": {"q": 1, "r": 1}}
    assert recipe.load("n-0.75-b").settings == {"z": 0, "p": {"q": 9, "r": 2}}
    assert recipe.load("n-0.75-b").about == "net 0.75 by b"


@pytest.mark.parametrize(
    ("files", "name", "line"),
    [
        ({"a": {"about": "", "extends": "b", "settings": {}}}, "a", "extends b, which is no other"),
        ({"a": {"about": "", "extends": "a", "settings": {}}}, "a", "extends a, which is no other"),
        ({"a": {"about": "", "extends": "b", "settings": {}},
          "b": {"about": "", "extends": "a", "settings": {}}}, "a", "extends a, which is no other"),
        ({"a": {"about": "", "settings": {}},
          "b": {"about": "", "name": "a", "settings": {}}}, "a", "there is another recipe named a"),
        ({"a": {"about": "", "settings": {}}}, "c", "'c': there is .* of a similar name: none; "),
        ({"abc": {"about": "", "settings": {}}}, "abd", "'abd': .* of a similar name: abc; "),
    ],
)  # fmt: skip
def test_recipes_that_lead_nowhere_are_told(folder, files, name, line):
    folder(**files)
    with pytest.raises(SettingsError, match=line):
        recipe.load(name)


GOOD = "about: a good one\nsettings: {seed: 7}\n"
BAD = {
    "not YAML": ("about: [\n", "not valid YAML"),
    "empty": ("", "None: a table is needed"),
    "a list": ("- a\n- b\n", "['a', 'b']: a table is needed"),
    "a number": ("3\n", "3: a table is needed"),
    "bytes": (b"\xff\xfe\x00", "not valid YAML"),
    "no about": ("settings: {}\n", "about: missing"),
    "about a list": ("about: [1]\nsettings: {}\n", "about = [1]"),
    "settings a list": ("about: b\nsettings: [1]\n", "settings = [1]"),
    "unknown key": (
        "about: b\nsetings: {}\n",
        "setings: unknown key; allowed: about, base, extends, name, settings, table; did you "
        "mean settings?",
    ),
    "a key twice": ("about: b\nabout: c\nsettings: {}\n", "about occurs twice"),
    "unknown braces": ("about: '{net}'\nname: x\nsettings: {}\n", "'{net}' is no axis"),
    "open brace": ("about: 'a {'\nsettings: {}\n", "about: '{' is no axis"),
    "format": ("about: 'a {x:>999999999}'\ntable: {x: {1: {}}}\n", "is no axis of the table (x)"),
    "attribute": ("about: '{x.y}'\ntable: {x: {1: {}}}\n", "'{x.y}' is no axis"),
    "table a list": ("about: b\ntable: {x: [1, 2]}\n", "table.x = [1, 2]"),
    "axis of numbers": ("about: b\ntable: {x: {1: 2}}\n", "table.x.1 = 2"),
    "many": (
        "about: b\ntable:\n"
        + "".join(f"  x{n}: {{1: {{}}, 2: {{}}, 3: {{}}, 4: {{}}}}\n" for n in range(9)),
        "262,144 combinations",
    ),
    "a path as name": ("about: b\nname: ../../x\nsettings: {}\n", "name = '../../x'"),
    "name twice": ("about: b\nname: x\ntable: {y: {1: {}, 2: {}}}\n", "another recipe named x"),
    "name of another": ("about: b\nname: good\nsettings: {}\n", "another recipe named good"),
    "extends nothing": ("about: b\nextends: nothing\n", "extends nothing, which is no other"),
    "nested": ("about: b\nsettings: " + "[" * 3000 + "]" * 3000, "nested more than"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_named_after_the_list_of_the_others(case, folder, tmp_path, capsys):
    content, words = BAD[case]
    (tmp_path / "also.yaml").write_text(GOOD)
    (tmp_path / "good.yaml").write_text(GOOD)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        recipe.command(Namespace(name=None))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    place = {"extends nothing": "recipe bad", "name of another": "good.yaml"}.get(case, str(bad))
    assert place in str(caught.value)
    assert len(str(caught.value)) < 500
    listed = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "also" and line.endswith("a good one") for line in listed)
    assert recipe.load("also").settings == {"seed": 7}
    with pytest.raises(SettingsError, match=r"bad|another recipe named good"):
        recipe.load("good" if case == "name of another" else "bad")


def test_several_damaged_files_get_a_line_each(folder, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("[")
    (tmp_path / "c.yaml").mkdir()
    (tmp_path / "good.yaml").write_text(GOOD)
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        (tmp_path / "project").mkdir()
        (tmp_path / "project" / "dvc.yaml").touch()
        patch.chdir(tmp_path / "project")
        cli.main(["recipe"])
    assert end.value.code == 1
    output = capsys.readouterr()
    assert output.out.split() == ["good", "a", "good", "one"]
    errors = [line for line in output.err.splitlines() if "error: " in line]
    assert len(errors) == len(output.err.splitlines()) == 3


@pytest.mark.parametrize("content", [None, "", "[1, 2]", "a: [", "a: 1\na: 2\n"], ids=repr)
def test_params_that_cannot_be_read_are_told_before_a_recipe_runs(content, folder, tmp_path):
    (tmp_path / "good.yaml").write_text(GOOD)
    if content is not None:
        (tmp_path / "params.yaml").write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for apply in (True, False):
            with pytest.raises(SettingsError, match=r"^params\.yaml: "):
                recipe.command(Namespace(name="good", apply=apply, seeds=[1]))


def test_every_file_is_read_once(monkeypatch):
    read = []
    whole = recipe.read_yaml
    monkeypatch.setattr(
        recipe, "read_yaml", lambda path, error: read.append(path) or whole(path, error)
    )
    recipe.command(Namespace(name=None))
    assert sorted(read) == sorted(recipe.FOLDER.glob("*.yaml"))


def test_a_recipe_does_not_choose_versions_of_libraries(folder):
    folder(a={"about": "a", "settings": {"libraries": {"torch": "1.0.0"}}})
    with pytest.raises(SettingsError, match="recipe a: libraries: "):
        recipe.load("a")


@pytest.fixture
def tiny(tmp_path, monkeypatch, programs):
    """A pipeline with one stage, which fails for x = 0; a recipe reports the commit's output."""
    Project(tmp_path).enter(monkeypatch)
    start_warm(monkeypatch)
    (tmp_path / "params.yaml").write_text("seed: 0\nx: 0\n")
    stage = {"cmd": "test ${x} -gt 0 && echo ${x} >out", "params": ["seed", "x"],
             "outs": [{"out": {"cache": False}}]}  # fmt: skip
    (tmp_path / "dvc.yaml").write_text(yaml_text({"stages": {"only": stage}}))
    monkeypatch.setattr(recipe, "_report", lambda name, commit: git("show", f"{commit}:out"))
    git("init", "-q")
    git("config", "user.name", "t")
    git("config", "user.email", "t@localhost")
    subprocess.run(["dvc", "init", "-q"], check=True)
    git("add", "-A")
    git("commit", "-q", "-m", "state")


def git(*command):
    return subprocess.run(["git", *command], check=True, capture_output=True, text=True).stdout


def experiments():
    """Ref below refs/exps of each experiment -> its output."""
    refs = [line for line in git("for-each-ref", "--format=%(refname:lstrip=2)").split()
            if re.match(r"\w\w/\w{38}/", line)]  # fmt: skip
    return {ref: int(git("show", f"refs/exps/{ref}:out")) for ref in refs}


@pytest.mark.pipeline
@pytest.mark.usefixtures("tiny")
def test_an_experiment_is_replaced_by_the_next_that_succeeds_on_the_same_commit(capfd):
    def ref(name):
        head = git("rev-parse", "HEAD").strip()
        return f"{head[:2]}/{head[2:]}/{name}"

    assert recipe.run(recipe.Recipe("r", "", {"x": 1}), [1, 2]) == ["1\n", "1\n"]
    old = {ref("r-seed1"): 1, ref("r-seed2"): 1}
    git("commit", "-q", "--allow-empty", "-m", "next")
    assert recipe.run(recipe.Recipe("r", "", {"x": 2}), [1]) == ["2\n"]
    now = {ref("r-seed1"): 2}
    assert experiments() == old | now
    with pytest.raises(SecateurError, match="recipe r: seed 1 failed"):
        recipe.run(recipe.Recipe("r", "", {"x": 0}), [1])
    assert experiments() == old | now
    git("update-ref", f"refs/exps/{ref('r-seed1-before')}", f"refs/exps/{ref('r-seed1')}")
    git("update-ref", "-d", f"refs/exps/{ref('r-seed1')}")  # as a killed process leaves it
    with pytest.raises(SecateurError, match="recipe r: seed 1 failed"):
        recipe.run(recipe.Recipe("r", "", {"x": 0}), [1])
    assert experiments() == old | now
    assert recipe.run(recipe.Recipe("r", "", {"x": 3}), [1]) == ["3\n"]
    assert experiments() == old | {ref("r-seed1"): 3}


def test_a_seed_is_asked_for_once():
    with pytest.raises(SettingsError, match=r"--seeds 1 2 1: each only once"):
        recipe.command(Namespace(name=recipe.read_recipes().names[0], seeds=[1, 2, 1], apply=False))


def test_the_table_of_a_recipe_has_its_description_as_it_is_written(capsys):
    """rich would read [fc1] as a tag."""
    model = {"accuracy": 0.9, "macs": 1, "macs_dense": 2}
    report = {
        "baseline": model, "finetuned": model, "compression": 2.0, "measured_speedup": 1.0,
        "seconds": {"prune": 1.0}, "hardware": "a processor",
        "layers": "model,filters_alive\nfinetuned,3\n",
    }  # fmt: skip
    recipe.show(recipe.Recipe("mine", "without [fc1]", {}), [1], [report])
    assert capsys.readouterr().out.startswith("mine: without [fc1]")


def test_the_published_names_are_there():
    wanted = ["greg-resnet56-0.9-greg1", "greg-resnet56-2.55x-greg2", "greg-vgg19-8.84x-greg1",
              "greg-resnet50-3.06x-greg2", "greg-resnet50-weights-greg1", "cifar10-jpeg-resnet20",
              "dense-cifar100-wrn-28-10", "dense-imagenet-resnext50",
              "gconv-dense-cifar100-condensenet86", "deephoyer-cifar100-resnet110-group-hs",
              "deephoyer-cifar10-vgg19-hs", "deephoyer-imagenet-resnet50-group-hs"]  # fmt: skip
    assert set(wanted) <= set(NAMES)
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in NAMES)
