"""What all commands share: words, widths, JSON, where they print, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import typer
from typer.testing import CliRunner

from vdcache.cli.main import app

COMMANDS = typer.main.get_command(app).commands


def run(*args, code=0):
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == code, done.output
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_made_of_whole_phrases(name):
    """An option is a thing: its help begins with that thing, and says what is the default."""
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        words = getattr(parameter, "help", None) or ""
        if parameter.name == "help":
            continue
        assert words[:1].isupper() and words.split()[0] not in ("Of", "Where", "Again", "In", "For"), (
            name,
            parameter.name,
            words,
        )
        assert "without." not in words and "; again" not in words, (name, parameter.name, words)


@pytest.mark.parametrize("args", [("recipes",), ("passes",), ("recipes", "dbcache-8-0-0.1")])
def test_a_pipe_gets_lines_that_are_not_cut(args, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = [line.rstrip() for line in run(*args).stdout.splitlines()]
    assert max(map(len, lines)) > 100
    if args == ("recipes",):
        from vdcache.methods.registry import families

        assert all(any(line.startswith(f.name) and f.summary in line for line in lines) for f in families())


def test_tables_as_json():
    assert {"name": "always", "from": "vdcache"}.items() <= json.loads(run("recipes", "--json").stdout)[1].items()
    assert json.loads(run("recipes", "fora-3", "--json").stdout)["name"] == "fora-3"
    assert {"pass", "policy", "predictor", "mask"} <= {row["group"] for row in json.loads(run("passes", "--json").stdout)}
    assert "torch" in json.loads(run("info", "--json").stdout)
    (trial,) = json.loads(run("try", "always", "--model", "tiny", "--steps", "2", "--json").stdout)
    assert trial["computed"] == [0, 1] and trial["identical"] and trial["error"] is None


def test_try_says_what_it_is_at_and_takes_no_empty_run():
    done = run("try", "every-2", "--model", "tiny", "--model", "demo", "--steps", "3")
    assert "trying tiny (1 of 2)" in done.stderr and "trying demo (2 of 2)" in done.stderr and "trying" not in done.stdout
    assert "--steps" in run("try", "every-2", "--steps", "0", code=2).output
    from vdcache.errors import ConfigError
    from vdcache.testing import try_recipe

    for wrong in ({"steps": 0}, {"tokens": 0}):
        with pytest.raises(ConfigError, match="at least 1; got 0"):
            try_recipe("every-2", ["tiny"], **wrong)


@pytest.mark.parametrize(
    "args",
    [
        ("recipes", "nope"),
        ("try", "nope"),
        ("try", "every-2", "--model", "nope"),
        ("explain", "nonsense"),
        ("explain", "vdcache.demo.model:example", "--recipe", "nope"),
        ("opt", "nowhere.txt", "--pipeline", "canonicalise"),
        ("demo", "--recipe", "nope"),
        ("run", "nowhere", "--out", "out.txt"),
        ("verify", "nowhere", "vdcache.demo.model:example"),
        ("export", "nonsense", "--out", "out", "--schedule", "0,2"),
        ("compare", "nowhere.png", "nowhere.png"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_ends_with_2(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*args, code=2)
    assert done.stderr.strip() and not done.stdout.strip() and "Traceback" not in done.output


def test_options_are_named_where_options_are_given(tmp_path):
    done = run("export", "vdcache.demo.model:example", "--out", str(tmp_path / "x"), "--schedule", "0,2", code=2)
    assert "give --steps" in done.stderr and "num_steps" not in done.stderr


def test_a_model_that_cannot_be_traced_is_one_message(tmp_path):
    """torch.export, which is tried last, prints its whole graph; and no page is left behind."""
    (tmp_path / "looks.py").write_text(
        textwrap.dedent(
            """
            import sys, torch
            from vdcache.testing import TinyDiT

            class Looks(TinyDiT):
                def forward(self, x, timestep, text):
                    print("the model's own word", file=sys.stderr)
                    if text.sum() > 0:
                        x = x * 2
                    return super().forward(x, timestep, text)

            def model():
                with torch.device("meta"):
                    return Looks(), (torch.empty(1, 5, 4), torch.empty(1), torch.empty(1, 3, 4)), {}
            """
        )
    )
    command = [sys.executable, "-m", "vdcache", "explain", "looks:model", "--html", "page.html"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert "Looks cannot be traced" in done.stderr and "give it real ones" in done.stderr
    assert "def forward" not in done.stderr and "Unable to find user code" not in done.stderr
    assert "the model's own word" in done.stderr, "what else is printed is kept"
    assert not (tmp_path / "page.html").exists()
