"""Files of the unified model, and the language models it takes: their kinds, adapters, limits."""

import json

import pytest
import torch
from helpers import assert_close, import_or_skip
from tiny_vtok import ASK, MAKE, SIZES, generator, tiny, tiny_fsq
from tiny_vtok import tiny_lm as unified

from vtok_ext.data.captioned.questions import vocabulary
from vtok_ext.models.vtok_lm import VTokLM
from vtok_ext.models.vtok_lm_config import VTokLMConfig, tiny_lm_config
from vtok_ext.models.vtok_text import WordTokenizer

import_or_skip("transformers")


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


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_narrow_language_models_begin_with_larger_weights(architecture):
    name = {"llama": "hidden_size", "gpt2": "n_embd"}[architecture]
    described = json.loads(tiny_lm_config(9, architecture, {name: 144}))
    assert described["initializer_range"] == pytest.approx(1 / 12)
    chosen = {name: 144, "initializer_range": 0.02}
    assert json.loads(tiny_lm_config(9, architecture, chosen))["initializer_range"] == 0.02


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
