"""The unified model: sequences, losses, heads, generation, files, and two architectures."""

import json

import pytest
import torch
from helpers import assert_close, import_or_skip
from tiny_vtok import SIZES, tiny, tiny_fsq
from tiny_vtok import tiny_lm as unified

from vtok_ext.data.captioned import CaptionedClips
from vtok_ext.data.captioned.questions import vocabulary
from vtok_ext.models.vtok_generation import generate_tokens
from vtok_ext.models.vtok_heads import FlowHead, MseHead
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_config import VTokLMConfig, tiny_lm_config
from vtok_ext.models.vtok_sequence import (
    GENERATION,
    IGNORED,
    UNDERSTANDING,
    Turn,
    build_sequences,
)
from vtok_ext.models.vtok_text import SPECIAL, WordTokenizer, load_text

import_or_skip("transformers")
ASK = Turn(UNDERSTANDING, "what colour is the circle", "red")
MAKE = Turn(GENERATION, "a red circle moves left")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_words_bytes_and_files(tmp_path):
    text = WordTokenizer(["red", "circle"])
    assert text.decode(text.encode("Red circle")) == "red circle"
    assert text.decode(text.encode("a zürich red, café")) == "a zürich red , café"
    assert len(text.encode("red circle")) == 2
    assert max(text.encode("red ~ \U0001f600")) < len(text)
    assert text.decode([*text.special.values()]) == ""
    text.save(str(tmp_path))
    assert load_text(str(tmp_path)).words == text.words
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ValueError, match="must be an object with `words`"):
        load_text(str(tmp_path))


def test_sequences_have_no_loss_on_prompts():
    text = WordTokenizer(vocabulary())
    batch = build_sequences([ASK, MAKE], [3, 3], text)
    special = {number: name for name, number in text.special.items()}

    def row(i):
        length = int(batch.attended[i].sum())
        names = []
        for number, is_visual in zip(
            batch.ids[i, :length].tolist(), batch.is_visual[i].tolist(), strict=False
        ):
            names.append("v" if is_visual else special.get(number) or text.decode([number]))
        return names

    head = ["<bos>", "<user>"]
    question, caption = ASK.prompt.split(), MAKE.prompt.split()
    asked = [*head, "<vision>", *"vvv", "</vision>", *question, "<assistant>", "red", "<eos>"]
    made = [*head, *caption, "<assistant>", "<vision>", *"vvv", "</vision>", "<eos>"]
    assert row(0) == asked and row(1) == made
    learnt = batch.labels[0] != IGNORED
    expected = [*text.encode("red"), text.special["<eos>"]]
    assert batch.labels[0][learnt].tolist() == expected
    assert learnt.nonzero().flatten().tolist() == [len(asked) - 2, len(asked) - 1]
    assert (batch.labels[1] == IGNORED).all()
    assert not batch.is_target[0].any() and torch.equal(batch.is_target[1], batch.is_visual[1])
    assert SPECIAL[0] == "<pad>" and not batch.attended[1, len(made) :].any()


def test_no_gradient_reaches_what_is_said_after_prompts(clip):
    """Logits of prompt words have no part in the loss: only those that precede the answer do."""
    model = unified()
    seen = []
    hook = model.lm.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape)
    )
    model(clip(2, 5, 16, 16), [ASK, Turn(UNDERSTANDING, "how", "fast left")])
    hook.remove()
    assert [shape[0] for shape in seen] == [2 + 3]  # words of the answers and <eos>


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "fsq"])
def test_mixed_batches_train_every_part(clip, architecture, discrete):
    model = unified(tiny_fsq() if discrete else None, architecture, predicted_steps=0).train()
    generators = [generator(i) for i in range(3)]
    losses = model(clip(3, 5, 16, 16), [ASK, MAKE, ASK], generators=generators)
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["under_loss"] > 0 and losses["vis_loss"] > 0 and losses["dec_loss"] > 0
    losses["loss"].backward()
    assert all(p.grad is None for p in model.tokenizer.encoder.parameters())
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # GPT-2's own word embedding serves as output layer; Llama's input embedding is used too.
    assert missing == []


@pytest.mark.parametrize("turns", [[ASK], [MAKE]], ids=["question", "video"])
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "fsq"])
@pytest.mark.parametrize("lambda_dec", [0.0, 1.0])
def test_every_batch_has_all_gradients(clip, turns, discrete, lambda_dec):
    """Several processes wait for one of every parameter in every step, also of one task alone."""
    model = unified(tiny_fsq() if discrete else None, lambda_dec=lambda_dec).train()
    model(clip(1, 5, 16, 16), turns)["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert any(p.requires_grad for p in model.tokenizer.decoder.parameters()) == (lambda_dec > 0)


@pytest.mark.parametrize(
    "weights, trains",
    [
        ({"lambda_vis": 0.0}, True),  # by the decoder, which reads predicted tokens
        ({"lambda_vis": 0.0, "predicted": 0.0}, False),
        ({"lambda_vis": 0.0, "lambda_dec": 0.0}, False),
        ({"lambda_dec": 0.0}, True),
    ],
)
def test_a_head_that_no_loss_reaches_is_frozen(clip, weights, trains):
    model = unified(predicted_steps=0, **weights).train()
    assert all(p.requires_grad == trains for p in model.head.parameters())
    for turns in ([ASK], [MAKE]):
        model.zero_grad()
        model(clip(1, 5, 16, 16), turns)["loss"].backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


@pytest.mark.parametrize("generation, turn", [(0.0, ASK), (1.0, MAKE)], ids=["ask", "make"])
def test_one_task_alone_leaves_what_the_other_trains_as_it_is(clip, generation, turn):
    """A weight decay wore out a trained decoder in a training that makes no videos."""
    from vtok_ext.training.vtok_lm_task import build_unified
    from vtok_ext.training.vtok_recipe import LanguageModelRecipe, UnifiedRecipe

    settings = UnifiedRecipe(head_width=16, head_depth=1, generation=generation)
    model = build_unified(tiny(stride=2), LanguageModelRecipe(), settings).train()
    decoder, words = model.tokenizer.decoder, model.lm.get_output_embeddings()
    parts = {"head": model.head, "decoder": decoder, "words": words, "lm": model.lm.base_model}
    before = {name: [p.clone() for p in part.parameters()] for name, part in parts.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.5)
    model(clip(2, 5, 16, 16), [turn, turn])["loss"].backward()
    optimizer.step()
    same = {
        name: all(map(torch.equal, part.parameters(), before[name])) for name, part in parts.items()
    }
    asks = turn is ASK
    assert same == {"head": asks, "decoder": asks, "words": not asks, "lm": False}


def test_a_batch_equals_its_samples(clip):
    """Padding and neighbours change nothing."""
    model, video = unified(lambda_dec=0.0), clip(2, 5, 16, 16)
    both = model(video, [ASK, MAKE], generators=[generator(0), generator(1)])
    ask = model(video[:1], [ASK], generators=[generator(0)])
    make = model(video[1:], [MAKE], generators=[generator(1)])
    assert_close(both["under_loss"], ask["under_loss"], "answer", factor=50)
    assert_close(both["vis_loss"], make["vis_loss"], "tokens", factor=50)
    assert ask["vis_loss"] == 0 and make["under_loss"] == 0


def test_the_loss_of_answers_is_a_mean_over_tokens(clip):
    model, video = unified(lambda_dec=0.0), clip(2, 5, 16, 16)
    long = Turn(UNDERSTANDING, "which", "red blue red blue red")
    turns, counts = (ASK, long), (2, 6)  # with <eos>
    both = model(video, turns)["under_loss"]
    alone = [model(video[i : i + 1], [turns[i]])["under_loss"] for i in range(2)]
    mean = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert_close(both, mean, "loss", factor=50)
    assert abs(both - sum(alone) / 2) > 1e-4


def test_predicted_tokens_come_gradually():
    config = unified(predicted=0.5, predicted_steps=100).config
    assert [config.predicted_part(step) for step in (0, 50, 100, 1000)] == [0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generation_with_cache_equals_one_pass_without(clip, architecture):
    """Feeding the generated tokens back in one pass must predict the same tokens."""
    model = unified(architecture=architecture, head="mse")
    prompts = ["a red circle", "a blue cross moves up"]
    tokens = generate_tokens(model, prompts, num_frames=5, generator=generator())
    assert tokens.shape == (2, 18, 12)
    positions = model.tokenizer.default_positions(5).expand(2, -1, -1)
    turns = [Turn(GENERATION, prompt) for prompt in prompts]
    batch = build_sequences(turns, [18, 18], model.text)
    with torch.no_grad():
        states = model._before_targets(model._states(batch, tokens, positions), batch)
        again = model.predict(states, positions.flatten(0, 1), [18, 18], generator())
    assert_close(again.view_as(tokens), tokens, "tokens", factor=100)


def test_answers_do_not_depend_on_the_batch(clip):
    model, video = unified(), clip(2, 5, 16, 16)
    questions = ["what colour is the circle", "how many"]
    together = model.answer(video, questions)
    alone = [model.answer(video[i : i + 1], [questions[i]])[0] for i in range(2)]
    assert together == alone and len(together) == 2
    with pytest.raises(ValueError, match="questions must be one per clip"):
        model.answer(video, ["how"])


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "fsq"])
def test_videos_from_text(discrete):
    model = unified(tiny_fsq() if discrete else None)
    first = model.generate(["a red circle"], num_frames=5, size=(20, 24), seed=3)
    assert first.shape == (1, 3, 5, 20, 24)
    assert torch.equal(model.generate(["a red circle"], num_frames=5, size=(20, 24), seed=3), first)
    other = model.generate(["a red circle"], num_frames=5, size=(20, 24), seed=4)
    assert not torch.equal(other, first)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        model.generate(["a"], num_frames=2, temperature=-1)
    with pytest.raises(ValueError, match="guidance must be 1 for a model trained without text_"):
        model.generate(["a"], num_frames=2, guidance=2.0)
    with pytest.raises(ValueError, match="guidance must be finite, got nan"):
        model.generate(["a"], num_frames=2, guidance=float("nan"))


@pytest.mark.parametrize("head", ["flow", "mse", "codes"])
def test_guidance_goes_from_no_text_to_the_text_and_beyond(head):
    model = unified(tiny_fsq() if head == "codes" else None, head=head, text_dropout=0.1)

    def tokens(prompts, guidance=1.0):
        options = {"num_frames": 3, "guidance": guidance, "generator": generator()}
        return generate_tokens(model, prompts, **options)

    texts = ["a red circle", "a blue cross moves left"]
    assert_close(tokens(texts, 0.0), tokens(["", ""]), "none", 20)
    assert_close(tokens(texts, 1.0 + 1e-7), tokens(texts), "text", 20)
    assert not torch.equal(tokens(texts, 4.0), tokens(texts))
    if head == "mse":  # whose first token no noise and no other token decides
        first = 3.0 * tokens(texts)[:, 0] - 2.0 * tokens(["", ""])[:, 0]
        assert_close(tokens(texts, 3.0)[:, 0], first, "beyond", 20)


def test_training_leaves_texts_out_for_guidance(clip):
    model = unified(text_dropout=1.0)
    video, words = clip(2, 5, 16, 16), model.lm.get_input_embeddings().weight

    def reached(text):
        model.zero_grad()
        model(video, [MAKE, ASK], generators=generator())["loss"].backward()
        return bool(words.grad[model.text.encode(text)].any(1).all())

    model.train()
    assert not reached("moves left") and reached("what colour is the")
    model.eval()
    assert reached("moves left")
    half = unified(text_dropout=0.5).train()
    turns = half._some_without_text([MAKE] * 400, generator())
    assert 150 < sum(turn.prompt == "" for turn in turns) < 250


def test_key_and_residual_tokens_have_statistics_of_their_own(clip):
    model = unified()
    video = clip(4, 9, 16, 16)
    tokens, positions, _, _ = model._encode(video, None)
    is_residual = positions[..., 1] == model.tokenizer.config.key_tokens
    assert is_residual.any() and not is_residual.all()
    model.fit_statistics([video])
    normal = model.normalised(tokens, positions)
    for rows in (normal[is_residual], normal[~is_residual]):
        assert rows.mean(0).abs().max() < 1e-5
        assert_close(rows.std(0), torch.ones(rows.shape[1]), "deviation", 20)
    assert_close(model.denormalised(normal, positions), tokens, "back", 20)
    model.fit_statistics([video[:, :, :1]])
    assert torch.equal(*model.token_deviation)


def test_gap_between_teacher_forced_and_free_running(clip):
    model = unified()
    gap = model.decoder_gap(clip(2, 5, 16, 16), ["a red circle", "a cross"])
    assert set(gap) == {"true", "teacher_forced", "free_running"}
    assert all(value > 0 for value in gap.values())


@pytest.mark.parametrize("discrete", [False, True], ids=["flow", "fsq"])
def test_gap_is_that_of_the_states_alone(clip, discrete):
    """Both are drawn alike: a language model that sees no video has no gap."""
    model = unified(tiny_fsq() if discrete else None)
    with torch.no_grad():
        for embed in (
            model.slot_embed.weight,
            model.frame_embed.weight,
            *model.projector[2].parameters(),
        ):
            embed.zero_()
        model.lm.get_input_embeddings().weight.zero_()
    gap = model.decoder_gap(clip(8, 9, 16, 16), ["a"] * 8)
    assert gap["teacher_forced"] == pytest.approx(gap["free_running"], rel=0.02)


def test_language_model_is_told_the_frames_of_tokens(clip):
    """Without, it could not know where a chosen key frame lies."""
    model = unified()
    tokens, positions, _, _ = model._encode(clip(1, 5, 16, 16), None)
    later = positions.clone()
    later[:, : model.tokenizer.config.key_tokens, 0] = 3
    seen, other = (model.embed_visual(tokens, p) for p in (positions, later))
    assert not torch.allclose(seen[:, 0], other[:, 0]) and torch.equal(seen[:, -1], other[:, -1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora", "fsq"])
def test_save_and_load_as_one_folder(clip, tmp_path, kind):
    if kind == "lora":
        import_or_skip("peft")
    options = {"lora_rank": 2} if kind == "lora" else {}
    tokenizer = tiny_fsq() if kind == "fsq" else None
    model = unified(tokenizer, "gpt2" if kind == "gpt2" else "llama", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator()))
    model.fit_statistics([clip(2, 5, 16, 16)])
    model.save_pretrained(str(tmp_path / "model"))
    loaded = VTokLM.from_pretrained(str(tmp_path / "model"))
    video = clip(2, 5, 16, 16)
    with torch.no_grad():
        losses = [
            m(video, [ASK, MAKE], generators=[generator(0), generator(1)]) for m in (model, loaded)
        ]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    (tmp_path / "model" / "config.json").write_text('{"format_version": 1, "config": {}}')
    with pytest.raises(ValueError, match="model must be VTokLM"):
        VTokLM.from_pretrained(str(tmp_path / "model"))


def test_saving_over_another_model_mixes_nothing(tmp_path, monkeypatch):
    """A failure leaves the old model; afterwards nothing of it is left."""
    folder = tmp_path / "model"
    old, new = unified(), unified(tiny_fsq())
    old.save_pretrained(folder)
    (folder / "text").mkdir()
    (folder / "text" / "old.json").write_text("{}")

    def full(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        for target in (folder, tmp_path / "other"):
            with pytest.raises(OSError, match="no space left"):
                new.save_pretrained(target)
    assert not (tmp_path / "other").exists()
    assert VTokLM.from_pretrained(folder).tokenizer.model_id == old.tokenizer.model_id
    new.save_pretrained(folder)
    assert VTokLM.from_pretrained(folder).tokenizer.model_id == new.tokenizer.model_id
    names = {"config.json", "model.safetensors", "text.json", "tokenizer"}
    assert {path.name for path in folder.iterdir()} == names
    book = tmp_path / "mine" / "text" / "book.txt"
    book.parent.mkdir(parents=True)
    book.write_text("not a model")
    with pytest.raises(FileExistsError, match="must be empty or a saved VTokLM, got text of"):
        new.save_pretrained(book.parents[1])
    assert book.exists()


def test_hub_downloads_hold_all_files(tmp_path, monkeypatch):
    from fnmatch import fnmatch

    from vtok_ext.models import _persistence

    model = unified()
    model.save_pretrained(tmp_path / "model")

    class Hub:
        @staticmethod
        def snapshot_download(source, allow_patterns):
            for path in (tmp_path / "model").rglob("*"):
                name = path.relative_to(tmp_path / "model")
                if path.is_file() and any(fnmatch(str(name), p) for p in allow_patterns):
                    (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / "cache" / name).write_bytes(path.read_bytes())
            return str(tmp_path / "cache")

    monkeypatch.setattr(_persistence, "require_hub", lambda op: Hub)
    loaded = VTokLM.from_pretrained("owner/name")
    assert loaded.tokenizer.model_id == model.tokenizer.model_id


def test_lora_trains_adapters_and_control_tokens():
    """Rows of the word table that were added for control tokens kept their random numbers."""
    import_or_skip("peft")
    model = unified(lora_rank=2)
    trained = [n for n, p in model.lm.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)
    assert {n for n, p in model.control.named_parameters() if p.requires_grad} == {
        "embedding_change",
        "output_change",
    }
    assert unified().control is None  # all rows are trained


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_control_tokens_change_beside_lora(clip, tmp_path, architecture):
    """Their rows alone; gradients of every batch; the folder of a version that had none."""
    from safetensors.torch import load_file, save_file

    import_or_skip("peft")
    targets = ("q_proj",) if architecture == "llama" else ("c_attn",)
    model = unified(architecture=architecture, lora_rank=2, lora_targets=targets, lambda_dec=0.0)
    video, ids = clip(2, 5, 16, 16), torch.arange(len(model.text))[None]
    states = torch.randn(1, 32, generator=generator())
    with torch.no_grad():
        words, logits = model.lm.get_input_embeddings()(ids), model.text_logits(states)
        assert torch.equal(model.embed_text(ids), words)  # nothing is changed at the start
    model.save_pretrained(str(tmp_path / "old"))
    for turns in ([ASK, MAKE], [MAKE, MAKE]):
        model.zero_grad()
        model.train()(video, turns)["loss"].backward()
        assert all(p.grad is not None for p in model.control.parameters())
    model.zero_grad()
    model(video, [ASK, ASK])["loss"].backward()
    torch.optim.SGD(model.control.parameters(), 1.0).step()
    special = set(model.text.special.values())
    with torch.no_grad():
        changed = (model.embed_text(ids) != words)[0].any(1).nonzero().flatten().tolist()
        # <eos> is said, never seen; <pad> stands where nothing looks.
        unseen = {model.text.special["<eos>"], model.text.special["<pad>"]}
        assert set(changed) == special - unseen
        said = (model.text_logits(states) != logits)[0].nonzero().flatten().tolist()
        assert set(said) == special
    model.eval().save_pretrained(str(tmp_path / "new"))
    loaded = VTokLM.from_pretrained(str(tmp_path / "new"))
    with torch.no_grad():
        assert torch.equal(loaded.embed_text(ids), model.embed_text(ids))
        assert torch.equal(loaded.text_logits(states), model.text_logits(states))
    path = tmp_path / "old" / "model.safetensors"
    weights = {n: t for n, t in load_file(path).items() if not n.startswith("control.")}
    save_file(weights, path)
    old = VTokLM.from_pretrained(str(tmp_path / "old"))
    with torch.no_grad():
        assert torch.equal(old.embed_text(ids), words)


@pytest.mark.parametrize(("pool", "lr", "steps"), [("attention", 3e-3, 150), ("grid", 1e-3, 120)])
def test_token_variance_does_not_collapse(clip, pool, lr, steps):
    """g is trained with the loss that predicts its own tokens. Were its targets not cut off and
    normalised by fixed statistics, constant tokens would be the easiest to predict."""
    tokenizer = tiny(stride=1, residual_pool=pool)
    model = unified(tokenizer, head="mse", lambda_dec=0.0).train()
    video = clip(8, 6, 16, 16)
    model.fit_statistics([video])

    def spread():
        with torch.no_grad():
            return model._encode(video, None)[0][:, 16:].flatten(0, 1).std(0).mean().item()

    before = spread()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    losses = []
    for _ in range(steps):
        loss = model(video, [MAKE] * 8)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert spread() > 0.7 * before


def test_flow_head_keeps_futures_apart_that_mse_averages():
    """Two tokens are equally likely: the flow samples one of them, the mean is neither."""
    torch.manual_seed(0)
    states = torch.zeros(256, 4)
    targets = torch.where(torch.arange(256)[:, None] % 2 == 0, 1.0, -1.0).expand(-1, 2)
    sizes = {}
    for head in (FlowHead(4, 2, 32, 2), MseHead(4, 2, 32, 2)):
        optimizer = torch.optim.Adam(head.parameters(), 3e-3)
        for _ in range(250):
            loss = head.loss(states, targets, [256], None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            sizes[type(head)] = head.predict(states, torch.randn(256, 2), 8).abs().mean()
    assert sizes[FlowHead] > 0.7 and sizes[MseHead] < 0.2


def test_one_question_set_is_fitted_to_100_percent():
    """Words in, words out: every part of the chain from pixels to answers works together."""
    clips = CaptionedClips(3, 24, 32, 32)
    items = [clips.clip(i) for i in range(3)]
    kinds = ("colour", "direction", "blink")
    asked = [(i, q) for i, item in enumerate(items) for q in item.questions if q.kind in kinds]
    video = torch.stack([items[i].video for i, _ in asked])
    turns = [Turn(UNDERSTANDING, q.text, q.answer) for _, q in asked]
    model = unified(tiny(stride=4, image_size=32, encoder_patch=8)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(150):
        loss = model(video, turns)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    answers = model.eval().answer(video, [turn.prompt for turn in turns])
    assert answers == [turn.answer for turn in turns]


def of_architecture(architecture, **sizes):
    text = WordTokenizer(vocabulary())
    torch.manual_seed(1)
    config = VTokLMConfig(tiny_lm_config(len(text), architecture, sizes), head_width=16)
    return VTokLM(config, tiny(stride=2), text).eval()


@pytest.mark.parametrize(
    "architecture, sizes",
    [
        ("bert", {}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 0.1, "head_dim": 16}),
    ],
)
def test_states_are_causal_and_logits_are_those_of_the_model(clip, architecture, sizes):
    """BERT's answers saw themselves; what the others make of their output layer was left out."""
    model = of_architecture(architecture, **sizes)
    width = model.lm.get_input_embeddings().embedding_dim
    inputs = torch.randn(2, 6, width, generator=generator())
    with torch.no_grad():
        states = model.lm.base_model(inputs_embeds=inputs).last_hidden_state
        expected = model.lm(inputs_embeds=inputs).logits
        begun = model.lm.base_model(inputs_embeds=inputs[:, :4]).last_hidden_state
        assert_close(model.text_logits(states), expected, "logits", factor=20)
    assert_close(begun, states[:, :4], "states", factor=100)
    losses = model.train()(clip(2, 5, 16, 16), [ASK, MAKE], generators=[generator()] * 2)
    losses["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in missing if "pooler" not in n] == []
    assert len(model.eval().answer(clip(1, 5, 16, 16), ["what"], max_tokens=2)) == 1


@pytest.mark.parametrize(
    "architecture, sizes, message",
    [
        ("bert", {"is_decoder": False}, "lm must be causal: .*, got bert"),
        ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 2}, "lm must .* got xlnet"),
        ("electra", {"embedding_size": 64}, "lm must have logits that .*, got electra"),
    ],
)
def test_language_models_of_another_kind_are_refused(architecture, sizes, message):
    with pytest.raises(ValueError, match=message):
        of_architecture(architecture, **sizes)


def test_positions_that_do_not_count_from_zero_are_refused():
    """Training counted RoBERTa's from 2, answers from 0."""
    from transformers import RobertaConfig, RobertaForCausalLM

    from vtok_ext.models.vtok_lm_checks import check_language_model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = RobertaForCausalLM(RobertaConfig(**sizes, vocab_size=50, is_decoder=True)).train()
    with pytest.raises(ValueError, match="lm must count positions from 0, .*, got roberta"):
        check_language_model(lm)
    assert all(module.training for module in lm.modules())


def test_errors():
    with pytest.raises(ValueError, match="head must be 'codes' for a discrete tokenizer"):
        unified(tiny_fsq(), head="flow")
    with pytest.raises(ValueError, match="task must be"):
        Turn("describe", "x")
    with pytest.raises(ValueError, match="lm_config must be JSON with model_type"):
        VTokLMConfig("{}")
    for name in ("predicted", "text_dropout"):
        with pytest.raises(ValueError, match=f"{name} must be at most 1"):
            VTokLMConfig('{"model_type": "llama"}', **{name: 2.0})
    for arguments, message in (
        (("lama",), "architecture must be a causal language model .* did you mean 'llama'"),
        (("t5",), "architecture must be a causal language model"),
        (("llama", {"hiden_size": 64}), "got 'hiden_size'; did you mean 'hidden_size'"),
        (("llama", {"hidden_size": 30}), "sizes must suit llama, got {'hidden_size': 30}"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_lm_config(9, *arguments)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_narrow_language_models_begin_with_larger_weights(architecture):
    name = {"llama": "hidden_size", "gpt2": "n_embd"}[architecture]
    described = json.loads(tiny_lm_config(9, architecture, {name: 144}))
    assert described["initializer_range"] == pytest.approx(1 / 12)
    chosen = {name: 144, "initializer_range": 0.02}
    assert json.loads(tiny_lm_config(9, architecture, chosen))["initializer_range"] == 0.02


def test_projector_keeps_the_size_of_tokens():
    torch.manual_seed(0)
    model = unified()
    tokens = torch.randn(256, model.tokenizer.config.latent_dim)
    assert 0.4 < model.projector(tokens).std() < 1


def test_texts_that_do_not_go_with_the_clips(clip):
    model, video = unified(), clip(2, 5, 16, 16)
    wrong = [
        (lambda: model(video, [ASK]), ValueError, r"turns must be one per clip \(2\), got 1"),
        (lambda: model.decoder_gap(video, ["a"]), ValueError, "prompts must be one per clip"),
        (lambda: model.answer(video, ["a", 3]), TypeError, "prompt must be text, got 3"),
        (lambda: model.answer(video[:1], "?"), TypeError, "questions must be a list of text"),
        (lambda: model.answer(video[0], ["a"] * 3), ValueError, r"video must be \[B, 3, T, H, W\]"),
        # Its letters were five prompts.
        (lambda: model.generate("a red", num_frames=2), TypeError, "prompts must be a list of"),
        (lambda: model.generate([], num_frames=2), ValueError, "turns must be at least one"),
        (lambda: model.generate(["a"], num_frames=0), ValueError, "num_frames must be an integer"),
        (
            lambda: model.generate(["a"], num_frames=2, temperature=float("nan")),
            ValueError,
            "temperature must be >= 0, got nan",
        ),
        (lambda: model.fit_statistics([]), ValueError, "videos must have two tokens or more"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sequences_longer_than_the_positions_are_refused(clip, architecture):
    """GPT-2 looked them up behind the end of its table, Llama went on with nonsense."""
    limit = {"llama": "max_position_embeddings", "gpt2": "n_positions"}[architecture]
    sizes = {**SIZES[architecture], limit: 40}
    text = WordTokenizer(vocabulary())
    config = VTokLMConfig(tiny_lm_config(len(text), architecture, sizes))
    model, video = VTokLM(config, tiny(stride=1), text).eval(), clip(1, 30, 4, 4)
    assert len(model.answer(video[:, :, :4], ["what"], max_tokens=2)) == 1
    for call in (
        lambda: model(video, [MAKE]),
        lambda: model.answer(video, ["what"]),
        lambda: model.generate(["a"], num_frames=30),
    ):
        with pytest.raises(ValueError, match="at most 40 tokens, .* got .*--max-frames .*--fps"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_videos_of_any_type_train(clip, dtype):
    losses = unified()(clip(1, 5, 16, 16).to(dtype), [MAKE])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pretrained_language_model_brings_its_own_text(clip, tmp_path, dtype):
    """A folder as `save_pretrained` of transformers writes it: here a tiny Llama and its words."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from vtok_ext.training.vtok_lm_task import build_unified
    from vtok_ext.training.vtok_recipe import LanguageModelRecipe, UnifiedRecipe

    words = {word: number for number, word in enumerate(["<unk>", "</s>", *vocabulary()])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    text = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")
    text.save_pretrained(tmp_path / "llama")
    torch.manual_seed(0)
    sizes = {**SIZES["llama"], "vocab_size": len(words)}
    LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).save_pretrained(tmp_path / "llama")
    source = LanguageModelRecipe(source=str(tmp_path / "llama"))
    model = build_unified(tiny(stride=2), source, UnifiedRecipe(head_width=16, head_depth=1))
    assert model.text.special["<eos>"] == 1 and len(model.text) > len(words)
    assert model.text.decode(model.text.encode("red circle")) == "red circle"
    losses = model(clip(2, 5, 16, 16), [ASK, MAKE])
    assert all(loss.isfinite() for loss in losses.values())
    model.eval().save_pretrained(str(tmp_path / "unified"))
    loaded = VTokLM.from_pretrained(str(tmp_path / "unified"))
    video = clip(1, 5, 16, 16)
    assert loaded.answer(video, ["what"]) == model.answer(video, ["what"])
    # The words of a model that was there before do not count.
    unified().save_pretrained(tmp_path / "over")
    model.save_pretrained(tmp_path / "over")
    assert len(VTokLM.from_pretrained(tmp_path / "over").text) == len(model.text)
    nothing = LanguageModelRecipe(source=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="language_model: source must be a folder or a hub"):
        build_unified(tiny(), nothing, UnifiedRecipe())
