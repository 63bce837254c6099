"""The unified model: sequences, losses, heads, generation."""

import pytest
import torch
from helpers import assert_close, import_or_skip
from tiny_vtok import ASK, MAKE, generator, tiny, tiny_fsq
from tiny_vtok import tiny_lm as unified

from vtok_ext.data.captioned import CaptionedClips
from vtok_ext.data.captioned.questions import vocabulary
from vtok_ext.models.failed_computation import FailedComputationError
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


def test_projector_keeps_the_size_of_tokens():
    torch.manual_seed(0)
    model = unified()
    tokens = torch.randn(256, model.tokenizer.config.latent_dim)
    assert 0.4 < model.projector(tokens).std() < 1


def test_texts_that_do_not_go_with_the_clips(clip):
    model, video = unified(), clip(2, 5, 16, 16)
    wrong = [
        (lambda: model(video, [ASK]), ValueError, r"turns must be one per clip \(2\), got 1"),
        (
            lambda: model(video, [ASK, MAKE], generators=[generator()]),
            ValueError,
            "generators must",
        ),
        (lambda: model.generate(["a"], num_frames=3, size=(0, 4)), ValueError, "size .H, W. and"),
        (lambda: model.generate(["a"], num_frames=3, output="x"), ValueError, "output must be one"),
        (lambda: model.answer(video, ["a", "b"], max_tokens=-1), ValueError, "max_tokens must be"),
        (lambda: model.decoder_gap(video, ["a"]), ValueError, "prompts must be one per clip"),
        (lambda: model.answer(video, ["a", 3]), TypeError, "prompt must be text, got 3"),
        (lambda: model.answer(video[:1], "?"), TypeError, "questions must be a list of text"),
        (lambda: model.answer(video[0], ["a"] * 3), ValueError, r"video must be \[B, 3, T, H, W\]"),
        # Its letters were five prompts.
        (lambda: model.generate("a red", num_frames=2), TypeError, "prompts must be a list of"),
        (lambda: model.generate([], num_frames=2), ValueError, "turns must be at least one"),
        (lambda: model.generate(["a"], num_frames=0), ValueError, "num_frames, size .* at least"),
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_videos_of_any_type_train(clip, dtype):
    losses = unified()(clip(1, 5, 16, 16).to(dtype), [MAKE])
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("discrete", [False, True], ids=["flow", "fsq"])
def test_damaged_weights_give_an_error_not_a_black_video(clip, discrete):
    model = unified(tiny_fsq(stride=2) if discrete else None)
    with torch.no_grad():
        next(model.head.parameters())[0] = torch.nan
    with pytest.raises(FailedComputationError, match="generate: the model must give finite"):
        model.generate(["a red circle"], num_frames=3, temperature=0.0)
    model = unified()
    with torch.no_grad():
        model.projector[0].weight[0, 0] = torch.nan
    with pytest.raises(FailedComputationError, match="answer: the model must give finite logits"):
        model.answer(clip(1, 5, 16, 16), ["what colour"])


def test_a_model_keeps_the_frame_rate_of_its_training(clip, tmp_path):
    model = unified(tiny(), fps=8.0)  # without a stride the rate decides how many tokens there are
    assert len(model.positions_for(24, None)) == len(model.positions_for(24, 8.0)) == 34
    assert len(model.positions_for(24, 24.0)) == 22
    model.save_pretrained(str(tmp_path))
    loaded = VTokLM.from_pretrained(str(tmp_path))
    assert loaded.config.fps == 8 and loaded._encode(clip(1, 24, 16, 16), None)[0].shape[1] == 34
    with pytest.raises(ValueError, match="fps"):
        unified(fps=0.0)
