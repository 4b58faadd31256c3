"""Packages that are exported once."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

from tests.exporting.packages import FORMATS, exported


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Verifying compiles, and Dynamo counts what it compiled of one forward over all tests."""
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """The tiny model in a form, exported when first asked for; not to be changed."""
    folder, made = tmp_path_factory.mktemp("packages"), {}

    def get(format="onnx"):
        if format not in made:
            made[format] = exported(folder / format, format)
        return made[format]

    return get


@pytest.fixture(params=FORMATS)
def package(request, packages):
    return packages(request.param)


@pytest.fixture
def copy(packages, tmp_path):
    """A package to spoil."""
    shutil.copytree(packages(), tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True, scope="session")
def operators_are_read_once():
    """For each graph torch's exporter parses the source of 500 operators of onnxscript again; they stay the same."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        found = _registration.onnxscript_apis.get_torchlib_ops
        patch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", functools.cache(found))
        yield
