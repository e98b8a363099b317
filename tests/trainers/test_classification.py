"""Jobs that train a classifier: the logits, losses and gradients of transformers' models for sequences under PEFT, and
the bits of each alone in packs with others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedModel

from polygraft.cluster.folders import Folders
from polygraft.cluster.model import FileId, JobId
from polygraft.cluster.states import JobState
from polygraft.cluster.store import keys
from polygraft.cluster.store.memory import MemoryStore
from polygraft.grafts.bound import BoundGraft
from polygraft.grafts.formats import native, peft
from polygraft.grafts.formats.backbone_files import BackboneFiles
from polygraft.grafts.formats.check import FormatError
from polygraft.grafts.grammar import parse
from polygraft.grafts.head import Head
from polygraft.grafts.runtime.backbone import Backbone
from polygraft.grafts.runtime.rows import RowBuilder
from polygraft.grafts.runtime.stacks import Resident
from polygraft.grafts.spec import SpecError
from polygraft.grafts.text.tokenise import Tokeniser
from polygraft.trainers.evaluate import judge, probabilities
from polygraft.trainers.head import ClassHead
from polygraft.trainers.job import Sample, TrainConfig, TrainJob
from polygraft.trainers.lanes.gradient import GradientLane
from polygraft.trainers.prepare import prepare
from polygraft.trainers.runner import PackRunner
from polygraft.trainers.worker import PackWorker
from tests.kernels.compare import relative
from tests.tiny import tiny_model, tokenizer_of
from tests.trainers.submitted import PACK, submit, submit_labelled
from tests.trainers.test_packed_equals_alone import METHODS, jobs_of, run

LABELS = ("bad", "fair", "good")
LORA = "lora(r=4, alpha=8, at=attn.[qv])"
KINDS = {"llama": "linear", "bert": "pooled", "roberta": "dense"}
SCORES = {"llama": ["score"], "bert": ["classifier"], "roberta": ["classifier"]}


def tiny_bert(folder: Path) -> Path:
    """BERT without a head for masked words, whose files have a pooler."""
    config = BertConfig(
        vocab_size=512, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=96
    )
    config.initializer_range = 0.1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "bert":
            tiny_bert(folder)
        case arch:
            tiny_model(folder, arch)
    return Backbone.load(folder, torch.float32, training=True)


def texts(count: int, seed: int, head: Head) -> tuple[Sample, ...]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = int(torch.randint(3, 20, (1,), generator=draw))
        ids = torch.randint(3, 500, (length,), generator=draw).tolist()
        found.append(Sample.labelled(ids, number % len(head.labels), head))
    return tuple(found)


def job_of(backbone: Backbone, peft: str = LORA, *, seed: int = 1, name: str = "labels", epochs: int = 2) -> TrainJob:
    kind = backbone.shape.head_kind
    assert kind is not None
    head = Head(LABELS, kind)
    graft = BoundGraft(replace(parse(peft), head=head), backbone.shape)
    config = TrainConfig(epochs=epochs, batch_size=3, learning_rate=5e-3, weight_decay=0.01, seed=seed, micro_rows=40)
    return TrainJob(name, graft, config, texts(7, seed, head), texts(5, seed + 50, head))


def trained(backbone: Backbone, job: TrainJob) -> dict[str, Tensor]:
    pack = PackRunner(backbone)
    running = pack.admit(job)
    while not running.finished:
        assert not pack.step().failed
    return dict(running.slab.tensors)


def logits(backbone: Backbone, graft: BoundGraft, values: dict[str, Tensor], one: Sample) -> Tensor:
    builder = RowBuilder()
    own = builder.add(one.ids[:-1], graft=0)
    stacks = backbone.stacks([Resident("g", graft, values)])
    with torch.inference_mode():
        hidden = backbone.states(builder.rows(), stacks, builder.attention(backbone.shape))
        return ClassHead(graft.head, values).logits(hidden[[own[one.weights.index(1.0) - 1]]])[0]


def sequences(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(LABELS), dtype=torch.float32, attn_implementation="eager"
    )
    model.config.pad_token_id = 0
    return model.eval()


def theirs(model: torch.nn.Module, one: Sample) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([one.ids[:-1]])).logits[0]
    return found


def test_a_published_graft_is_a_folder_whose_logits_pefts_model_has(backbone: Backbone, tmp_path: Path) -> None:
    job = job_of(backbone)
    values = trained(backbone, job)
    backbone_files = BackboneFiles(backbone.folder)
    name = native.save(tmp_path, job.graft, values, backbone=backbone.fingerprint, backbone_files=backbone_files)
    stored = native.load(tmp_path / name, shape=backbone.shape, backbone=backbone.fingerprint)
    assert stored.graft.spec.head == Head(LABELS, KINDS[backbone.shape.arch])  # type: ignore[arg-type]
    config = json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and set(SCORES[backbone.shape.arch]) <= set(config["modules_to_save"])
    model = PeftModel.from_pretrained(sequences(backbone.folder), str(tmp_path / name)).eval()
    differ = 0.0
    for one in (*job.train, *job.held_out):
        found = logits(backbone, stored.graft, dict(stored.tensors), one)
        assert relative(found, theirs(model, one).detach()) < 1e-5
        differ = max(differ, float((found - found.mean()).abs().max()))
    assert differ > 1e-3
    again, tensors = peft.load(tmp_path / name, backbone.shape, backbone_files)
    assert again.spec.head == Head(("LABEL_0", "LABEL_1", "LABEL_2"), KINDS[backbone.shape.arch])  # type: ignore[arg-type]
    assert tensors.keys() == values.keys()
    assert all(torch.equal(tensors[name], value) for name, value in stored.tensors.items())


def test_a_folder_that_peft_has_saved_gives_its_logits_here(backbone: Backbone, tmp_path: Path) -> None:
    names = ["q_proj", "v_proj"] if backbone.shape.arch == "llama" else ["query", "value"]
    model = get_peft_model(
        sequences(backbone.folder), LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=names)
    ).eval()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(str(tmp_path))
    graft, values = peft.load(tmp_path, backbone.shape, BackboneFiles(backbone.folder))
    for one in job_of(backbone).train:
        assert relative(logits(backbone, graft, values, one), theirs(model, one).detach()) < 1e-5


def test_a_folder_without_its_head_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    job = job_of(backbone)
    bare = BoundGraft(replace(job.graft.spec, head=None), backbone.shape)
    values = {name: value for name, value in trained(backbone, job).items() if not name.startswith("head.")}
    backbone_files = BackboneFiles(backbone.folder)
    peft.export(tmp_path, bare, values, backbone_files=backbone_files)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    with pytest.raises(FormatError, match="is missing, which SEQ_CLS saves"):
        peft.load(tmp_path, backbone.shape, backbone_files)


def test_losses_and_gradients_are_those_of_transformers_model_under_peft(backbone: Backbone, tmp_path: Path) -> None:
    """Of a whole global batch, at trained values."""
    job = job_of(backbone)
    values, backbone_files = trained(backbone, job), BackboneFiles(backbone.folder)
    name = native.save(tmp_path, job.graft, values, backbone=backbone.fingerprint, backbone_files=backbone_files)
    model = PeftModel.from_pretrained(sequences(backbone.folder), str(tmp_path / name), is_trainable=True).eval()
    batch = job.train[:4]
    every = torch.stack([theirs(model, one) for one in batch])
    loss = F.cross_entropy(every, torch.tensor([one.label for one in batch]))
    loss.backward()

    pack = PackRunner(backbone)
    running = pack.admit(replace(job, train=batch, config=replace(job.config, batch_size=4, micro_rows=1000)))
    running.slab.fill(values)
    pack._restack()
    lane = pack._gradient
    assert isinstance(lane, GradientLane)
    (collect,) = lane.forward(lane.stacks, {job.id: running.micro_batch(0)})
    part = collect()
    assert part.loss == pytest.approx(float(loss), rel=1e-5) and part.gradient is not None
    # By the same road that values go to PEFT: the gradients as a graft's tensors.
    slopes = {name: torch.zeros_like(value) for name, value in running.slab.tensors.items()}
    slopes |= running.slab._by_name(part.gradient)
    _, files = peft._written(job.graft, slopes, backbone_files)
    named = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): p for name, p in model.named_parameters()
    }
    assert len(files) == sum(parameter.requires_grad for parameter in model.parameters())
    for key, slope in files.items():
        gradient = named[key].grad
        assert gradient is not None and gradient.norm() > 0
        assert relative(slope, gradient) < 1e-4, key


def test_the_judgement_is_by_the_likeliest_label(backbone: Backbone) -> None:
    job = job_of(backbone)
    values = trained(backbone, job)
    found = torch.stack([logits(backbone, job.graft, values, one) for one in job.held_out])
    labels = torch.tensor([one.label for one in job.held_out])
    assert relative(probabilities(backbone, job.graft, values, job.held_out, 40), found.softmax(1)) < 1e-5
    told = judge(backbone, job.graft, values, job.held_out, 40)
    assert told.loss == pytest.approx(float(F.cross_entropy(found, labels)), rel=1e-5)
    assert told.scores.accuracy == pytest.approx(float((found.argmax(1) == labels).float().mean()))
    assert set(told.scores.told) == {"accuracy", "macro_f1"} and told.scores.score == told.scores.accuracy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_classifiers_among_other_jobs_end_with_the_bits_of_each_alone(
    dtype: torch.dtype, folder: Path, one_thread: None
) -> None:
    backbone = Backbone.load(folder, dtype, training=True)
    grafts = {"labels": LORA, "more": "prefix(3) + parallel(8)", "vera": "vera(r=16)"}
    jobs = [job_of(backbone, text, seed=seed, name=name) for seed, (name, text) in enumerate(grafts.items())]
    others = jobs_of(4, {name: METHODS[name] for name in ("lora", "dora", "ia3", "prefix")})

    def ended(company: list[TrainJob]) -> dict[str, Tensor]:
        pack = PackRunner(backbone, max_rows=140)
        for job in company:
            pack.admit(job)
        return run(pack)

    packed = ended([others[0], jobs[0], others[1], *jobs[1:], *others[2:]])
    for job in [*jobs, *others]:
        assert torch.equal(packed[job.id], ended([job])[job.id]), job.id


def test_an_encoders_jobs_end_with_the_bits_of_each_alone(backbone: Backbone, one_thread: None) -> None:
    jobs = [
        job_of(backbone, text, seed=seed, name=text) for seed, text in enumerate((LORA, "bitfit", "houlsby(4)", "ia3"))
    ]

    def ended(company: list[TrainJob]) -> dict[str, Tensor]:
        pack = PackRunner(backbone, max_rows=90)
        for job in company:
            pack.admit(job)
        return run(pack)

    packed = ended(jobs)
    for job in jobs:
        assert torch.equal(packed[job.id], ended([job])[job.id]), job.id


def test_a_classifier_learns_its_texts_by_heart(backbone: Backbone) -> None:
    job = job_of(backbone, "lora(r=8)", epochs=40)
    before = PackRunner(backbone)
    before.admit(job)
    first = before._judged(job.id, job.train)
    after = judge(backbone, job.graft, trained(backbone, job), job.train)
    assert after.scores.accuracy == 1.0 and after.loss < 0.3 < first.loss


def test_an_encoder_takes_no_other_jobs(tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_model(tmp_path, "roberta"), torch.float32, training=True)
    job = replace(job_of(backbone), graft=BoundGraft(parse(LORA), backbone.shape))
    with pytest.raises(SpecError, match="a job there classifies texts"):
        PackRunner(backbone).admit(job)
    with pytest.raises(SpecError, match="a job without a backward trains no classifier"):
        PackRunner(backbone).admit(job_of(backbone, "lora + mezo"))


def test_bert_without_a_pooler_is_refused(tmp_path: Path) -> None:
    backbone = Backbone.load(tiny_model(tmp_path, "bert"), torch.float32, training=True)
    with pytest.raises(SpecError, match="have no pooler"):
        PackRunner(backbone).admit(job_of(backbone))


def test_a_job_of_labelled_texts_is_published_with_its_scores(folder: Path, tmp_path: Path) -> None:
    store, backbone = MemoryStore(), Backbone.load(folder, torch.float32, training=True)
    submit(store, tmp_path, {"ftjob-0": "ia3"})
    lines = [{"sentence": f"{word} fruit {n}", "label": word} for n in range(3) for word in ("sweet", "sour")]
    submit_labelled(store, tmp_path, "lora(r=8)", lines, epochs=20)
    store.append(keys.commands(PACK), {"op": "close", "job": ""})
    tokeniser = Tokeniser.load(folder)
    PackWorker(PACK, PackRunner(backbone), tokeniser, store, folders=Folders(tmp_path), micro_rows=128).run(
        lambda: None
    )
    chat, job = (store.get(keys.job(JobId(f"ftjob-{number}"))) for number in range(2))
    assert (
        chat is not None and chat.value.state is JobState.SUCCEEDED and chat.value.judged.after.exact_match is not None
    )
    assert job is not None and job.value.state is JobState.SUCCEEDED, job
    told = job.value.judged
    assert told.after.accuracy == 1.0 and told.test.accuracy == 1.0 and told.before.accuracy is not None
    assert told.test_loss is not None and told.test_loss == job.value.loss_after
    graft = native.load(tmp_path / "grafts" / str(job.value.graft), shape=backbone.shape, backbone=backbone.fingerprint)
    assert graft.graft.spec.head == Head(("sour", "sweet"))
    assert (tmp_path / "grafts" / str(job.value.graft) / "adapter_config.json").exists()


def test_so_is_one_on_an_encoder(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "roberta", "roberta")
    store, backbone = MemoryStore(), Backbone.load(folder, torch.float32, training=True)
    submit(store, tmp_path, {})
    lines = [{"text": f"{word} fruit {n}", "text2": "a pair", "label": word} for n in range(2) for word in ("a", "b")]
    submit_labelled(store, tmp_path, "lora(r=8)", lines, epochs=20)
    store.append(keys.commands(PACK), {"op": "close", "job": ""})
    pack, tokeniser = PackRunner(backbone), Tokeniser.load(folder)
    PackWorker(PACK, pack, tokeniser, store, folders=Folders(tmp_path), micro_rows=128).run(lambda: None)
    job = store.get(keys.job(JobId("ftjob-1")))
    assert job is not None and job.value.state is JobState.SUCCEEDED and job.value.judged.after.accuracy == 1.0


def test_what_is_read_of_a_text_is_its_last_token_however_it_is_cut(folder: Path, tmp_path: Path) -> None:
    store, tokeniser = MemoryStore(), Tokeniser.load(folder)
    lines = [{"sentence": "graft " * 40, "label": 1}, {"sentence": "a", "sentence2": "b", "label": 0}]
    (tmp_path / "files").mkdir()
    record = submit_labelled(store, tmp_path, "ia3", lines, epochs=1, max_length=10)
    files = tmp_path / "files"
    job = prepare(record, files=files, tokeniser=tokeniser, backbone_files=BackboneFiles(folder), micro_rows=128)
    long, pair = job.train
    assert (len(long.ids), long.label, pair.label) == (11, 1, 0) and job.graft.spec.head == Head(("0", "1"))
    assert tokeniser.decode(pair.ids[:-1]) == "a\nb"
    assert all(one.weights == (*[0.0] * (len(one.ids) - 1), 1.0) for one in job.train)
    assert job.warnings and job.warnings[0].startswith("training_file: 1 of 2 examples are longer than 10 tokens")
    (files / f"{FileId('file-ftjob-1')}.jsonl").write_text('{"sentence": "a", "label": 1}\n')
    with pytest.raises(ValueError, match='label: "1" is the only one'):
        prepare(record, files=files, tokeniser=tokeniser, backbone_files=BackboneFiles(folder), micro_rows=128)
