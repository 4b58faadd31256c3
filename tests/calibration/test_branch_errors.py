"""The table of step errors as JSON."""

import pytest

from vdcache.calibration.branch_errors import StepErrors
from vdcache.errors import ConfigError

ERRORS = StepErrors(3, {"attention": ((0.1, 0.2), (0.3,)), "mlp": ((0.5, 1), (2.5,))}, 2)


def test_json_round_trip(tmp_path):
    text = ERRORS.to_json(tmp_path / "errors.json")
    assert StepErrors.from_json(text) == StepErrors.from_json(tmp_path / "errors.json") == ERRORS


@pytest.mark.parametrize("text", ["nonsense", "[]", "{}", '{"steps": 3, "errors": {"mlp": 3}, "generations": 1}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"this is no table of step errors: it was not written by StepErrors\.to_json"):
        StepErrors.from_json(text)
