"""Name the tensors and layers in which numbers are not finite."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_shard.errors import UserError
from moe_shard.models.params import describe
from moe_shard.program.norms import require_finite
from tests.models.build import annotator, random_params, small_config


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    config = small_config({"fsdp": 2, "expert": 4})
    specs = describe(config.model, annotator(config)).specs
    params = random_params(config)
    places = jax.tree.map(lambda spec: spec.sharding, specs)
    require_finite(jax.device_put(params, places), specs, "folder")
    params["layers"]["mlp"]["router"]["kernel"][2, 3, 1] = bad
    with pytest.raises(UserError) as caught:
        require_finite(jax.device_put(params, places), specs, "folder")
    what, fix = str(caught.value).splitlines()
    assert what.startswith("folder: weights that are not finite (NaN or inf): 1 in ")
    assert what.endswith("layers.mlp.router.kernel[2]")
    assert fix.startswith("fix: ")
