"""What README and docs show works: code runs, command lines parse, links lead somewhere, defaults and numbers are current."""

import argparse
import inspect
import re
import shlex
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import pytest
import yaml
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.algorithm import RatioVarianceAlgorithm
from sb3_r2vpo.common.callbacks import DropNonFiniteMinibatches
from sb3_r2vpo.common.critic import JointCritic, SeparateCritic
from sb3_r2vpo.core.objectives import OBJECTIVES
from sb3_r2vpo.core.policy_loss import RatioVarianceLoss
from sb3_r2vpo.zoo import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
#: Code of these pages needs a language model from elsewhere
LLM = "llm"
#: Environments that a page leaves to the reader
READERS_OWN = {"MyEnv-v0": "mine"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """All command lines of README and docs: those of blocks, and those within text."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`((?:r2vpo|python|make|pip) [^`]+)`", page.read_text())
        found += [(name_of(page), shlex.join(words)) for line in lines if (words := shlex.split(line, comments=True))]
    return found


def tables(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell, without backticks."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip("` "): [cell.strip("` ") for cell in row[1:]] for row in rows}


# === Python ===


@pytest.fixture
def tiny_budgets(monkeypatch, tmp_path):
    """Everything is as it is written, but for the number of steps and epochs."""
    monkeypatch.chdir(tmp_path)
    make, make_ppo = RatioVarianceAlgorithm._setup_model, PPO._setup_model
    learn = R2VPO.learn

    def shorten(model):
        model.n_steps, model.batch_size, model.n_epochs = min(model.n_steps, 16), min(model.batch_size, 16), 1
        if getattr(model, "critic_kwargs", None) and "n_epochs" in model.critic_kwargs:
            model.critic_kwargs = {**model.critic_kwargs, "n_epochs": 1}

    def setup_model(self):
        shorten(self)
        make(self)

    def setup_ppo(self):
        shorten(self)
        make_ppo(self)

    def short_learn(self, total_timesteps, *args, **kwargs):
        return learn(self, min(total_timesteps, 300), *args, **kwargs)

    monkeypatch.setattr(RatioVarianceAlgorithm, "_setup_model", setup_model)
    monkeypatch.setattr(PPO, "_setup_model", setup_ppo)
    monkeypatch.setattr(R2VPO, "learn", short_learn)
    # Ten episodes of a policy that has learned nothing tell as much after one step each
    monkeypatch.setattr("stable_baselines3.common.evaluation.evaluate_policy", evaluate_for_a_step)


def evaluate_for_a_step(model, env, n_eval_episodes, **kwargs):
    env = env if hasattr(env, "num_envs") else model._wrap_env(env, verbose=0)
    actions, _ = model.predict(env.reset(), deterministic=True)
    return float(env.step(actions)[1].mean()), 0.0


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page.parent.name != LLM], ids=name_of)
@pytest.mark.usefixtures("tiny_budgets")
def test_python_runs(page):
    names = {"__name__": "__main__"}
    # Blocks of a page go on from each other
    for number, block in enumerate(blocks(page, "python"), start=1):
        code = compile(block, f"{name_of(page)}, block {number}", "exec", dont_inherit=True)
        if "envpool" in block.lower():
            pytest.importorskip("envpool")
        if "dm_control/" in block:
            pytest.importorskip("dm_control")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Classes that blocks define are looked up by name when they are saved
            sys.modules["__main__"].__dict__.update({name: names[name] for name in names if not name.startswith("__")})
            exec(code, names)
        sys.modules["__main__"].__dict__.update({name: value for name, value in names.items() if inspect.isclass(value)})


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == LLM], ids=name_of)
def test_python_of_language_models_imports(page):
    """The models are not here, the names are."""
    for number, block in enumerate(blocks(page, "python"), start=1):
        compile(block, f"{name_of(page)}, block {number}", "exec", dont_inherit=True)
        for line in re.findall(r"^(?:from|import) .*$", block, re.MULTILINE):
            module = line.split()[1]
            for extra in ("trl", "verl", "transformers"):
                if extra in module.split("."):
                    pytest.importorskip(extra)
            exec(line, {})


# === Command lines ===


class Parsed(Exception):
    """Options are right."""


COMMANDS = commands()


@pytest.mark.parametrize("command", sorted({line for _, line in COMMANDS if line.startswith("r2vpo ")}))
def test_r2vpo_parses(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["r2vpo"])
    # `enjoy` asks for one first
    monkeypatch.setenv("DISPLAY", ":0")
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(parser, *args, **kwargs):
        options = parse_args(parser, *args, **kwargs)
        if parser.prog != "r2vpo":
            raise Parsed
        return options

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for env_id, package in READERS_OWN.items():
        monkeypatch.setitem(sys.modules, package, sys)
        monkeypatch.setitem(gym.registry, env_id, gym.spec("CartPole-v1"))
    # A run to go on with
    run = tmp_path / "logs" / "r2vpo" / "CartPole-v1_1" / "CartPole-v1"
    run.mkdir(parents=True)
    for file in ("args.yml", "config.yml"):
        (run / file).write_text("algo: r2vpo\nenv: CartPole-v1\nseed: 1\n")
    options = shlex.split(command)[1:]
    if "--help" in options or len(options) < 2:
        assert options[0] in cli.COMMANDS
        return
    with pytest.raises(Parsed):
        cli.main(options)


@pytest.mark.parametrize("command", sorted({line for _, line in COMMANDS if not line.startswith("r2vpo ")}))
def test_other_commands_name_what_there_is(command):
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1], re.MULTILINE)
    for names in re.findall(r"(?:sb3-r2vpo|\.)\[(\w[\w,]*)\]", command):
        assert set(names.split(",")) <= set(extras)


# === The site ===


def test_navigation_has_every_page_once():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for item in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(item)]

    pages = leaves(config["nav"])
    # The README is the first page, see docs/hooks.py
    assert sorted(pages) == sorted(["index.md", *(page.relative_to(DOCS).as_posix() for page in PAGES[1:])])
    assert config["strict"]
    assert config["theme"]["font"] is False


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for file, name in re.findall(r"<!-- table (\S+) (\S+) -->", text):
        table = (ROOT / file).read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]
        assert table.startswith("|")


def test_pages_of_the_api_name_what_there_is():
    for page in (DOCS / "api").glob("*.md"):
        for name in re.findall(r"::: (\S+)", page.read_text()):
            path = ROOT.joinpath(*name.split("."))
            is_module = path.with_suffix(".py").is_file()
            parent, _, member = name.rpartition(".")
            source = ROOT.joinpath(*parent.split(".")).with_suffix(".py")
            assert is_module or re.search(rf"^(class|def) {member}\b", source.read_text(), re.MULTILINE), name


# === Defaults, metrics and numbers ===


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            R2VPO,
            ("var_coef", "target_variance", "objective", "objective_kwargs", "critic_kwargs", "noise_exponent", "compile"),
        ),
        (RatioVarianceLoss, ("dual_learning_rate", "min_var_coef", "compensate_entropy")),
        (SeparateCritic, ("n_epochs", "gae_lambda", "std_scaled_learning_rate")),
        (JointCritic, ("recompute_advantages",)),
        (R2VPOOff, ("replay_capacity", "utd_ratio")),
    ],
)
def test_defaults_are_those_of_the_code(function, names):
    rows = tables((DOCS / "algorithm.md").read_text())
    parameters = inspect.signature(function).parameters
    for name in names:
        assert rows[name][0].replace('"', "'") == repr(parameters[name].default), name


def test_every_objective_is_listed():
    rows = tables((DOCS / "algorithms" / "objectives.md").read_text())
    listed = {name.strip("` ") for cell in rows for name in cell.split(",")}
    assert set(OBJECTIVES) <= listed


class Reach(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(action[0]), False, self.np_random.random() < 0.2, {}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (R2VPO, {"var_coef": "auto", "noise_exponent": 0.5, "clip_range_vf": 0.2, "target_kl": 10.0}),
        (R2VPOOff, {"critic_kwargs": {"n_rollouts": 2, "n_epochs": 1}, "ent_coef": 0.01}),
        (R2VPO, {"objective": "ppo_clip", "objective_kwargs": {"clip_range": 0.2}}),
    ],
)
def test_every_metric_is_explained(algorithm, options):
    model = algorithm("MlpPolicy", Reach(), n_steps=32, batch_size=16, n_epochs=1, device="cpu", seed=0, **options)
    logger = configure(None, [])
    model.set_logger(logger)
    logged: set[str] = set()
    logger.dump = lambda step=0: (logged.update(logger.name_to_value), logger.name_to_value.clear())
    model.learn(96, callback=DropNonFiniteMinibatches())
    assert "train/ratio_variance" in logged
    text = (DOCS / "algorithms" / "metrics.md").read_text()
    for name in logged:
        if not name.startswith(("time/", "rollout/ep_")):
            assert f"`{re.sub('_stale_.*', '_stale_1', name)}`" in text, name


def test_results_are_those_of_the_benchmark():
    """Scores in README and docs are the ones in the table that the benchmark writes."""
    control = (ROOT / "benchmarks" / "control" / "README.md").read_text()
    summary = tables(control.split("<!-- summary -->")[1].split("<!-- /summary -->")[0])
    readme = tables((ROOT / "README.md").read_text())
    for method in ("PPO", "R2VPO", "R2VPOOff", "PPO, annealed entropy bonus"):
        assert [cell.strip("*") for cell in readme[method]] == summary[method][1:5]
    for page in ("r2vpo", "r2vpo_off"):
        text = (DOCS / "algorithms" / f"{page}.md").read_text()
        assert summary[{"r2vpo": "R2VPO", "r2vpo_off": "R2VPOOff"}[page]][1] in text
