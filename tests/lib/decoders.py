"""A decoder against transformers' own: what holds for every family, shipped or a user's."""

import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lib.mechanisms import BOUND, text_logits


def split_documents(batch):
    """Per document: its text ids (in stream order with 0 at visual rows), visual flags, and slice of the stream."""
    start = 0
    for document in batch.layout.documents:
        length = sum(run.length for run in document)
        visual = torch.tensor([run.visual for run in document for _ in range(run.length)])
        yield slice(start, start + length), visual
        start += length


def hf_decoder(model):
    """transformers' own causal LM with the decoder's weights: the names must fit without a change."""
    twin = AutoModelForCausalLM.from_config(model.config.text_config, attn_implementation="eager").eval()
    twin.load_state_dict(model.language_model.state_dict(), strict=True)
    return twin


def hf_loss(model, twin, batch, diagonal):
    """Loss and text logits of the pack from transformers' decoder, a document at a time.

    With `diagonal`, a visual row sees only itself: EE-MLLM is a dense layer under that mask.
    """
    visual_Vh = model.projector(model.image_features(batch.pixel_values))
    logits_Tv, used = [], 0
    for rows, visual in split_documents(batch):
        x_Lh = twin.get_input_embeddings()(batch.input_ids[rows])
        n = int(visual.sum())
        x_Lh = x_Lh.masked_scatter(visual[:, None], visual_Vh[used : used + n])
        used += n
        length = len(visual)
        sees = torch.ones(length, length).tril().bool()
        if diagonal:
            sees[visual] = torch.eye(length).bool()[visual]
        size, types = getattr(twin.config, "sliding_window", None), getattr(twin.config, "layer_types", None)
        chunk = torch.arange(length) // (getattr(twin.config, "attention_chunk_size", None) or length)
        masks = {"full_attention": sees, "sliding_attention": sees if size is None else sees.triu(1 - size)}
        masks |= {"chunked_attention": sees & (chunk[:, None] == chunk)}
        masks = {
            kind: torch.zeros(1, 1, length, length).masked_fill(~mask, torch.finfo(torch.float32).min)
            for kind, mask in masks.items()
        }
        mask = masks["sliding_attention"] if types is None else masks  # without types of layers all slide, if any do
        logits_Tv.append(twin(inputs_embeds=x_Lh[None], attention_mask=mask).logits[0, ~visual])
    logits = torch.cat(logits_Tv)
    return cross_entropy(logits[batch.target_rows], batch.targets, reduction="sum"), logits


def assert_same_gradients(found, true):
    """Every gradient within the bound; tensors whose true gradient is zero up to rounding are left out."""
    scale = max(g.abs().max() for g in true.values() if g is not None)
    compared = 0
    for name, gradient in true.items():
        if gradient is None or gradient.abs().max() < 1e-6 * scale:
            continue
        assert tiny.max_error(found[name], gradient) <= BOUND, name
        compared += 1
    assert compared > len(true) // 2


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def check_decoder_equals_transformers(model, pack, diagonal):
    """Logits, loss and every gradient; `diagonal` as in `hf_loss`."""
    batch, twin = tiny.pack(pack), hf_decoder(model)
    true_loss, true_logits = hf_loss(model, twin, batch, diagonal)
    assert tiny.max_error(text_logits(model, batch), true_logits) <= BOUND
    loss = model.packed_loss(batch)
    torch.testing.assert_close(loss, true_loss, rtol=BOUND, atol=0)
    assert_same_gradients(gradients(model.language_model, loss), gradients(twin, true_loss))
