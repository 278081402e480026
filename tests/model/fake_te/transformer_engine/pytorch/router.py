"""FAKE, see the package: names that Megatron imports; nothing calls them with moe_router_fusion off."""


def fused_compute_score_for_moe_aux_loss(*_):
    raise NotImplementedError


def fused_moe_aux_loss(*_):
    raise NotImplementedError


def fused_topk_with_score_function(*_):
    raise NotImplementedError
