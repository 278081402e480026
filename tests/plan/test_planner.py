"""What a plan says: terms by hand, published recipes, what breaks first, and the search."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from r1engine.config import RlConfig
from r1engine.hf.architecture import read_architecture
from r1engine.plan.command import _print_least
from r1engine.plan.cost import parts_of, total
from r1engine.plan.hardware import GIB, GPUS, Assumed
from r1engine.plan.layout import Layout
from r1engine.plan.memory import Job, optimizer_bytes, stage_memory
from r1engine.plan.planner import knobs, make_plan
from r1engine.plan.request import job_of, layout_of
from r1engine.plan.search import least_gpus, search
from r1engine.plan.settings import alternatives, settings
from r1engine.plan.sizes import forward_work, total_parameters

ROOT = Path(__file__).resolve().parents[2]
V3 = read_architecture(ROOT / "configs" / "models" / "DeepSeek-V3")
JOB = Job(
    questions=512,
    group_size=16,
    minibatches=16,
    inner_epochs=1,
    prompt_tokens=200,
    mean_tokens=8000,
    max_tokens=32_768,
    row_tokens=34_816,
    has_reference=True,
    logits_chunk=1024,
    generator_tensor=16,
    generator_bytes=1,
)
R1 = Layout(gpus=512, tensor=8, pipeline=16, expert=32, first_stage=4, last_stage=1)


def test_the_terms_of_a_middle_stage_by_hand():
    # Four MoE layers: attention and shared expert over 8 ranks, 8 of 256 experts whole, router and norms whole.
    attention = (7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168) // 8 + 2048
    expert = 3 * 7168 * 2048
    layer = attention + 8 * expert + expert // 8 + 7168 * 256 + 2 * 7168
    memory = stage_memory(V3, R1, JOB, GPUS["h800"], Assumed(), 5)
    assert sum(memory.parameters.values()) == 4 * layer
    assert memory.training["weights"] == pytest.approx(2 * 4 * layer / GIB)
    assert memory.training["gradients"] == pytest.approx(4 * 4 * layer / GIB)
    # Dense state is split over 4 data-parallel ranks, experts have no second copy to split over.
    experts = 4 * 8 * expert
    assert optimizer_bytes(memory.parameters, R1) == pytest.approx(12 * ((4 * layer - experts) / 4 + experts))
    # Full recompute keeps the input of each layer, of min(16 - 5, rows) micro-batches.
    rows = JOB.rows(R1.data)
    kept = min(11, rows) * 4 * 2 * 7168 * 34_816 / 8
    assert memory.training["activations"] * GIB > kept


@pytest.mark.parametrize(("stage", "chunks"), [(0, 11), (3, 5)])  # 2 (3 - stage) + 4 of the warm-up, and one
def test_interleaved_stages_hold_more_micro_batches(stage, chunks):
    llama = read_architecture(ROOT / "configs" / "models" / "Llama-3.1-8B")
    job = dataclasses.replace(JOB, minibatches=1)
    plain, interleaved = (
        stage_memory(llama, Layout(gpus=4, pipeline=4, virtual=v), job, GPUS["h100"], Assumed(), stage).training
        for v in (1, 2)
    )
    of_a_micro_batch = 8 * 2 * 4096 * job.row_tokens / GIB  # the inputs of eight layers in bfloat16
    more = chunks / 2 - (4 - stage)
    assert interleaved["activations"] - plain["activations"] == pytest.approx(more * of_a_micro_batch)


def test_fp8_linears_by_hand():
    """Attention without its latent's projection, three dense MLPs and 58 shared experts: faster, and 2 bytes more."""
    fp8 = dataclasses.replace(JOB, fp8=True)
    attention = 7168 * 1536 + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    linears = 61 * attention + 3 * 3 * 7168 * 18_432 + 58 * 3 * 7168 * 2048
    assert forward_work(V3).linears == 2 * linears
    update, quick = (
        next(p for p in make_plan(V3, R1, job, GPUS["h800"], Assumed(fp8_gain=2.0)).phases if p.name == "update")
        for job in (JOB, fp8)
    )
    flops = 4 * JOB.tokens / 512 * linears * (JOB.rows(R1.data) + 15) / JOB.rows(R1.data)  # half of 2 a weight
    rate = 989e12 * 0.55 * 34_816 / (34_816 + 2048)
    saved = update.seconds["matrix products"] - quick.seconds["matrix products"]
    assert saved == pytest.approx(flops / rate)
    terms = stage_memory(V3, R1, fp8, GPUS["h800"], Assumed(), 5)
    in_fp8 = sum(terms.parameters[name] for name in ("attention", "shared experts"))
    assert terms.training["FP8 copies"] == pytest.approx(2 * in_fp8 / GIB)


def test_fp8_copies_of_routed_experts_by_hand():
    """Two bytes a weight: 4 layers, 8 of 256 experts with three matrices of 7168 x 2048 each."""
    layout = Layout(gpus=512, tensor=1, pipeline=16, expert=32, first_stage=3, last_stage=2)
    job = dataclasses.replace(JOB, fp8_experts=True)
    terms = stage_memory(V3, layout, job, GPUS["h800"], Assumed(), 5)
    assert terms.training["FP8 copies"] == pytest.approx(2 * 4 * 8 * 3 * 7168 * 2048 / GIB)


def test_a_layout_whose_shards_fp8_cannot_take_is_refused_and_not_searched():
    llama = read_architecture(ROOT / "configs" / "models" / "Qwen2.5-Math-1.5B")  # 1536 columns, 2 key/value heads
    fp8 = dataclasses.replace(JOB, fp8=True, generator_tensor=1)
    odd = dataclasses.replace(llama, intermediate_size=8960 + 8)
    with pytest.raises(ValueError, match="the intermediate size is 8968 on the only tensor-parallel rank"):
        make_plan(odd, Layout(gpus=1), fp8, GPUS["h100"], Assumed())
    assert search(odd, fp8, 1, GPUS["h100"], Assumed()) == []


def test_the_copy_of_colocated_servers_by_hand():
    # 671B of FP8 over the 16 GPUs of a server: a node of 8 keeps half of it.
    with_servers, without = (dataclasses.replace(JOB, has_servers=has, generator_tensor=16) for has in (True, False))
    plans = [make_plan(V3, R1, job, GPUS["h800"], Assumed()) for job in (with_servers, without)]
    more = sum(plans[0].host_gib.values()) - sum(plans[1].host_gib.values())
    assert more == pytest.approx(JOB.generator_bytes * 671.03e9 / 2 / GIB, rel=1e-3)
    assert plans[0].host_gib["servers, while training"] == pytest.approx(more)


def test_reward_models_of_the_trainer_by_hand():
    plain, rating = dataclasses.replace(JOB, has_reference=False), dataclasses.replace(JOB, raters=2)
    alone, both = (make_plan(V3, R1, job, GPUS["h800"], Assumed()) for job in (plain, rating))
    each = 2 * max(sum(stage.parameters.values()) for stage in alone.stages) / GIB  # bf16
    assert both.host_gib["reward models"] == pytest.approx(8 * 2 * each)  # two of them, eight GPUs a node
    assert "reward models" not in alone.host_gib and "reward model" not in alone.worst.logprobs
    lone = make_plan(V3, R1, dataclasses.replace(plain, raters=1), GPUS["h800"], Assumed())
    assert lone.worst.logprobs["reward model"] == both.worst.logprobs["reference"]


def test_an_optimizer_on_the_host_by_hand():
    on_host = dataclasses.replace(R1, optimizer_offload=True)
    device, host = (make_plan(V3, layout, JOB, GPUS["h800"], Assumed()) for layout in (R1, on_host))
    state = max(optimizer_bytes(stage.parameters, R1) for stage in device.stages)
    fullest = max(device.stages, key=lambda stage: sum(stage.parameters.values()))
    assert [stage.training["optimizer"] for stage in host.stages] == [0.0] * 16
    assert host.host_gib["optimizer"] == pytest.approx(8 * optimizer_bytes(fullest.parameters, R1) / GIB)
    assert sum(host.host_gib.values()) == pytest.approx(sum(device.host_gib.values()))
    phase = next(p for p in host.phases if p.name == "optimizer")
    assert phase.traffic_gb["PCIe"] == pytest.approx(16 * state / 12 * (4 + 2) / 1e9)  # fp32 down, bf16 up
    assert phase.seconds["gradients down, weights up"] == pytest.approx(phase.traffic_gb["PCIe"] / (55 * 0.7))
    assert phase.seconds["Adam on the CPUs"] == pytest.approx(16 * 2 * state / (100e9 / 8))
    assert "optimizer.offload=true" in [name for name, _ in knobs(device)]


def test_logits_exist_on_the_last_stage_only():
    of = [stage_memory(V3, R1, JOB, GPUS["h800"], Assumed(), stage).training["logits"] for stage in (0, 15)]
    assert of == [0.0, pytest.approx(4 * 1024 * 129_280 / 8 / GIB)]


def test_context_parallelism_by_hand():
    # Half the tokens of a row on each rank, but its keys and values whole: 128 heads of 192 + 128 over 8 ranks, and
    # 576 numbers of the latents. The same in the working set of a layer, half as much again.
    half = dataclasses.replace(R1, context=2)
    one, two = (stage_memory(V3, at, JOB, GPUS["h800"], Assumed(), 15).training for at in (R1, half))
    inputs = 1 * 2 * 7168 * 34_816 / 8 / GIB  # of one layer and micro-batch, all that stage 15 keeps
    keys = 1.5 * 2 * 34_816 * (128 * 320 / 8 / 2 + 576) / GIB
    working_set = one["activations"] - inputs
    assert two["activations"] == pytest.approx((inputs + working_set) / 2 + keys)
    assert two["MoE buffers"] == pytest.approx(one["MoE buffers"] / 2)
    assert two["optimizer"] == pytest.approx(one["optimizer"])  # 2 x 2 ranks share it as 4 did


def test_context_parallelism_sends_latents_to_the_other_ranks_of_the_row():
    traffic = [
        make_plan(V3, layout, JOB, GPUS["h800"], Assumed()).phases[1].traffic_gb  # of the log-probabilities
        for layout in (R1, dataclasses.replace(R1, context=4))
    ]
    assert "CP" not in traffic[0]
    # Two passes; each of 4 ranks sends its quarter of the tokens to three others, 576 numbers in 61 / 16 layers.
    assert traffic[1]["CP"] == pytest.approx(2 * JOB.tokens / 4 * 3 * 576 * 2 * 61 / 16 / 1e9)


def test_the_search_deals_rows_that_are_too_long_for_one_gpu():
    small = read_architecture(ROOT / "configs" / "models" / "Llama-3.1-8B")
    job = dataclasses.replace(JOB, max_tokens=1_000_000, row_tokens=1_048_576, mean_tokens=250_000, generator_tensor=8)
    best = search(small, job, 64, GPUS["h100"], Assumed(), keep=1)[0]
    assert best.fits and best.layout.context > 1
    without = make_plan(small, dataclasses.replace(best.layout, context=1), best.job, best.gpu, best.assumed)
    assert not without.fits and f"parallel.context={2}" in [name for name, _ in knobs(without)]


def test_what_does_not_fit_names_the_term_and_the_knob():
    layout = dataclasses.replace(R1, expert=8, recompute="none")
    plan = make_plan(V3, layout, JOB, GPUS["h800"], Assumed())
    assert "GPU memory in update" in plan.limits()[0] and "activations" in plan.limits()[0]
    names = [name for name, _ in knobs(plan)]
    assert names[0] == "model.recompute=true" and "parallel.expert=16" in names


def test_a_generator_that_cannot_hold_the_model_is_a_limit():
    job = dataclasses.replace(JOB, generator_tensor=8, generator_bytes=2)
    assert any(limit.startswith("generator:") for limit in make_plan(V3, R1, job, GPUS["h800"], Assumed()).limits())


def test_the_search_ranks_what_fits_by_time():
    plans = search(V3, JOB, 256, GPUS["h800"], Assumed())
    assert all(plan.fits for plan in plans)
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)


def test_the_search_takes_longer_rows_where_they_fit_and_are_full():
    small, assumed, gpu = read_architecture(ROOT / "configs" / "models" / "Qwen2.5-Math-1.5B"), Assumed(), GPUS["h100"]
    job = dataclasses.replace(JOB, mean_tokens=768.0, max_tokens=3072, row_tokens=4096, generator_tensor=1)
    best = search(small, job, 8, gpu, assumed)[0]
    short = make_plan(small, best.layout, job, gpu, assumed)
    assert best.fits and best.job.row_tokens == 16_384 and best.seconds < short.seconds / 2
    few = search(small, dataclasses.replace(job, questions=64), 8, gpu, assumed)[0]
    share = few.job.tokens / few.job.minibatches / few.layout.data
    assert few.job.row_tokens <= share < 2 * few.job.row_tokens


@pytest.fixture(scope="module")
def least():
    return least_gpus(V3, JOB, GPUS["h800"], Assumed())


def test_the_least_number_of_gpus_fits_and_half_of_it_does_not(least):
    assert least is not None and least.fits
    assert not any(plan.fits for plan in search(V3, JOB, least.layout.gpus // 2, GPUS["h800"], Assumed()))
    on_host = search(V3, JOB, least.layout.gpus // 2, GPUS["h800"], Assumed(), optimizer_offload=True)
    assert on_host[0].fits and on_host[0].layout.optimizer_offload


def test_too_few_gpus_are_told_the_least_number_that_fits(least):
    console = Console(record=True, width=200)
    _print_least(V3, JOB, GPUS["h800"], Assumed(), console)
    assert f"the least number of H800s that fits is {least.layout.gpus}: TP" in console.export_text()


def test_a_cluster_that_cannot_hold_one_layer_is_told_what_breaks():
    nearest = search(V3, JOB, 1, GPUS["rtx4090"], Assumed(), keep=1)[0]  # a layer of experts alone takes 68 GB
    assert not nearest.fits and nearest.limits()[0].startswith("GPU memory in update")


SMALL = read_architecture(ROOT / "configs" / "models" / "Qwen2.5-Math-1.5B")
SMALL_JOB = dataclasses.replace(
    JOB, mean_tokens=768.0, max_tokens=3072, row_tokens=4096, generator_tensor=1, generator_bytes=2
)


def test_the_embedded_generator_has_pages_for_sequences_of_mean_length_and_for_the_longest():
    job = dataclasses.replace(SMALL_JOB, slots=100)
    terms = make_plan(SMALL, Layout(gpus=8), job, GPUS["h100"], Assumed()).stages[0].generating
    of_a_token = 28 * 2 * 2 * 128 * 2  # layers, keys and values, 2 heads of 128, bf16
    assert terms["keys and values"] * GIB == pytest.approx(100 * (768 + 200) * of_a_token)
    alone = make_plan(SMALL, Layout(gpus=8), dataclasses.replace(job, slots=2), GPUS["h100"], Assumed()).stages[0]
    assert alone.generating["keys and values"] * GIB == pytest.approx((3072 + 200) * of_a_token)
    few, many = (
        make_plan(SMALL, Layout(gpus=8), dataclasses.replace(job, slots=n), GPUS["h100"], Assumed()) for n in (64, 4096)
    )
    assert few.fits and many.limits()[0].startswith("GPU memory in generate")
    assert "rollout.slots=2048" in [name for name, _ in knobs(many)]
    best = search(SMALL, job, 8, GPUS["h100"], Assumed())[0]
    assert best.job.slots == 256 and best.seconds < few.seconds  # 512 wait as long for the longest


def test_generators_on_their_own_gpus_work_ahead():
    own = dataclasses.replace(SMALL_JOB, generators=4, generator_tensor=2)
    plan, ahead = (
        make_plan(SMALL, Layout(gpus=8), dataclasses.replace(own, is_ahead=is_ahead), GPUS["h100"], Assumed())
        for is_ahead in (False, True)
    )
    assert plan.gpus == 8 + 4 * 2 and plan.stages[0].generating == {}
    times = {phase.name: phase.total for phase in plan.phases}
    work = times["logprobs"] + times["update"] + times["optimizer"]
    assert plan.seconds == pytest.approx(sum(times.values()))
    assert ahead.seconds == pytest.approx(max(times["generate"], work) + times["refresh"] + times["switch"])
    shared = make_plan(SMALL, Layout(gpus=8), dataclasses.replace(SMALL_JOB, is_ahead=True), GPUS["h100"], Assumed())
    assert shared.seconds == pytest.approx(sum(phase.total for phase in shared.phases))  # one GPU does one or the other
    sizes = {plan.job.generator_tensor * plan.job.generators for plan in search(SMALL, own, 8, GPUS["h100"], Assumed())}
    assert sizes == {8}  # a search deals the generators' GPUs anew, and takes no more


def test_the_search_leaves_room_on_a_gpu():
    plans = search(SMALL, SMALL_JOB, 8, GPUS["h100"], Assumed(fill_share=0.5, kv_pool_share=0.4))
    assert plans and all(plan.peak[1] <= 0.5 * GPUS["h100"].memory_gib for plan in plans)


def test_settings_make_the_plan_again_and_alternatives_are_better_or_told():
    plan = search(SMALL, dataclasses.replace(SMALL_JOB, slots=64), 8, GPUS["h100"], Assumed())[0]
    given = settings(plan)
    cfg = RlConfig.model_validate(nested({key: yaml.safe_load(value) for key, value in (s.split("=") for s in given)}))
    assert layout_of(cfg, 8) == plan.layout and cfg.max_row_tokens == plan.job.row_tokens
    assert cfg.rollout.slots == plan.job.slots
    others = dict(alternatives(plan))
    assert others.keys() == {"optimizer.offload=true", "model.fp8=true"}
    assert others["optimizer.offload=true"].layout.optimizer_offload and others["model.fp8=true"].job.fp8
    assert others["model.fp8=true"].seconds < plan.seconds < others["optimizer.offload=true"].seconds


def nested(flat: dict) -> dict:
    found: dict = {"data": {"max_prompt_tokens": 1024}, "rollout": {"max_tokens": 3072}}
    for key, value in flat.items():
        *sections, name = key.split(".")
        section = found
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return found


def test_a_whole_run_by_hand():
    cfg = RlConfig(model={"path": ROOT / "configs/models/Qwen2.5-Math-1.5B"}, steps=10_400, max_row_tokens=70_000)
    job = dataclasses.replace(job_of(cfg, Assumed()), slots=4)
    plan = make_plan(SMALL, Layout(gpus=8), job, GPUS["h100"], Assumed())
    first, second = parts_of(cfg, plan)  # 32,768 tokens until step 8,200
    assert (first.strides, second.strides) == (8_200 / 16, 2_200 / 16) and first.plan.seconds == plan.seconds
    assert (second.plan.job.max_tokens, second.plan.job.mean_tokens) == (65_536, 16_384)
    cost = total([first.hours, second.hours], GPUS["h100"], Assumed(gpu_hour_price=2.5))
    hours = (8_200 * first.plan.seconds + 2_200 * second.plan.seconds) / 16 / 3600
    assert (cost.hours, cost.gpu_hours) == (pytest.approx(hours), pytest.approx(8 * hours))
    assert (cost.price, cost.megawatt_hours) == (pytest.approx(20 * hours), pytest.approx(8 * 700 * hours / 1e6))
    assert total([first.hours], GPUS["h100"], Assumed()).price is None


def test_more_of_anything_costs_more():
    plan = make_plan(V3, R1, JOB, GPUS["h800"], Assumed())
    longer = make_plan(V3, R1, dataclasses.replace(JOB, mean_tokens=16_000), GPUS["h800"], Assumed())
    assert longer.seconds > plan.seconds
    faster = make_plan(V3, R1, JOB, GPUS["h100"], Assumed())
    assert faster.seconds < plan.seconds  # NVLink


def test_weights_for_generators_of_their_own_take_what_one_network_card_takes():
    model = 2 * total_parameters(SMALL) / 1e9
    own = dataclasses.replace(SMALL_JOB, generators=4, generator_tensor=2)

    def seconds(gpu: str, **assumed: float) -> float:
        plan = make_plan(SMALL, Layout(gpus=8), own, GPUS[gpu], Assumed(**assumed))
        (found,) = (phase for phase in plan.phases if phase.name == "refresh")
        assert found.traffic_gb == pytest.approx({"refresh sent": model / 8, "refresh received": model})
        return found.total

    assert seconds("h800") == pytest.approx(model / (50 * 0.7))
    assert seconds("h100", refresh_cards=8) == pytest.approx(model / (8 * 50 * 0.7))
    assert seconds("h800", refresh_cards=8) == pytest.approx(model / (200 * 0.7))  # each GPU gets all, over NVLink


def test_receivers_take_experts_where_they_are_served_and_all_else_once_a_node():
    job = dataclasses.replace(JOB, has_receivers=True, generators=16, generator_tensor=16, generator_expert=16)
    layout = Layout(gpus=256, tensor=4, pipeline=16, expert=16, context=4, first_stage=3, last_stage=2)
    for size, bound in ((2, 3.0), (1, 1.5)):  # BF16, FP8
        plan = make_plan(V3, layout, dataclasses.replace(job, generator_bytes=size), GPUS["h800"], Assumed())
        (found,) = (phase for phase in plan.phases if phase.name == "refresh")
        experts, others = size * 58 * 256 * 44_040_192 / 1e9, size * 17.126
        of_layer = experts / 58
        # 14 of the 16 stages have 4 layers with experts; their ranks send all of them to 16 servers.
        assert found.traffic_gb["refresh sent"] == pytest.approx(16 * of_layer * 4 / 16 + 32 * others / 256, rel=0.01)
        assert found.traffic_gb["refresh received"] == pytest.approx(experts / 16 + others, rel=1e-3)
        passed_on = others * 7 / 8 / (200 * 0.7)
        assert found.total == pytest.approx(found.traffic_gb["refresh sent"] / (50 * 0.7) + passed_on, rel=1e-3)
        assert found.total < bound
