"""FAKE, see the package: which recipe is in force."""

import contextlib
import os


class FP8GlobalStateManager:
    recipe = None

    @classmethod
    def is_fp8_enabled(cls):
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls):
        return cls.recipe

    @classmethod
    def is_fp8_block_scaling_available(cls):
        """The real one asks the GPU; here a test says it."""
        reason = os.environ.get("FAKE_TE_LACKS", "")
        return not reason, reason


@contextlib.contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


def fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=False):
    raise NotImplementedError("parameters in FP8")
