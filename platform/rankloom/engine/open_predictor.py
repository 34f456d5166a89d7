"""The choice of a runner, a predictor and its cache: the fast ones, where they give the plain ones' logits."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from rankloom import kernels
from rankloom.config.engine import EngineConfig
from rankloom.engine.device_predictor import DevicePredictor
from rankloom.engine.heap import keep_freed_memory
from rankloom.engine.kv_cache import KvCache
from rankloom.engine.kv_pool import KvPool
from rankloom.engine.layers import is_replaceable
from rankloom.engine.model_runner import ModelRunner
from rankloom.engine.padded_runner import PaddedRunner
from rankloom.engine.predictor import PlainPredictor, Predictor
from rankloom.engine.runner import Runner
from rankloom.errors import ModelError
from rankloom.models.device import is_lost

logger = logging.getLogger(__name__)


def open_runner(model: PreTrainedModel, *, pack: bool) -> Runner:
    """Return a runner for an architecture; `pack` as in `ServedBank`.

    Raises:
        ModelError: none can serve it.
    """
    if is_replaceable(model):
        try:
            return ModelRunner(model, pack=pack)
        except ModelError as error:
            logger.info("the model's own attention serves: %s", error)
    return PaddedRunner(model, pack=pack)


def open_predictor(
    runner: Runner, cache_tokens: int, longest: int | None, num_seqs: int, config: EngineConfig
) -> tuple[KvCache | KvPool, Predictor]:
    """Return a cache of `cache_tokens` and the predictor over it.

    Args:
        longest: the most tokens that the base has positions for; None: any number.

    Raises:
        ConfigError: the device has no memory for the cache.
    """
    if isinstance(runner, ModelRunner) and kernels.use_on(runner.shape.device) and runner.shape.is_uniform:
        pool = KvPool(runner.shape, cache_tokens)
        context = min(pool.longest, longest or pool.longest)
        fast = DevicePredictor(
            runner, pool, num_seqs, config.resolve_num_tokens(on_gpu=runner.shape.device.type != "cpu"), context
        )
        if _works(fast):
            return pool, fast
    if runner.shape.device.type == "cpu":
        keep_freed_memory()
    cache = KvCache(runner.shape, cache_tokens)
    return cache, PlainPredictor(runner, cache)


def _works(predictor: DevicePredictor) -> bool:
    try:
        if predictor.agrees():
            return True
        logger.warning("the fast path gives other logits than the plain one, which serves instead")
    except Exception as error:  # such as a kernel that this GPU can't run
        if is_lost(error):
            raise
        logger.warning("the fast path fails, and the plain one serves instead", exc_info=error)
    return False
