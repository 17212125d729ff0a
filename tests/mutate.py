"""Would the tests notice?  One-line bugs in the method, put into a copy of the project one by one.

    python tests/mutate.py                   # all of them, two at a time: minutes (Linux, macOS)
    python tests/mutate.py --list            # only what they are called
    python tests/mutate.py cosine table      # those with one of these words in their file or name
    python tests/mutate.py --write           # all of them, and the result in results/mutations.*

A bug is noticed if a test fails with it that passes without it. A bug that survives asks for a
test. The authors' tensors (BEIT2_GOLDEN) are left out, because readers do not have them; --golden
shows what those tensors alone would notice.

A new bug is an entry more: what is wrong, a text that stands in the file exactly once, and the
same text with the bug in it. Three kinds are not in the list, because they change nothing: a bias
of the keys (soft-max takes it out), another factor on a loss that AdamW minimises, and the sg in
the codebook term of Eq. (2), which is only logged (the codes move by moving average).
"""
import argparse
import importlib
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600  # seconds until a test that does not end counts as failed
TESTS = {  # which tests/test_*.py run, in this order, where a bug names no others
    "vqkd.py": "nearest_code straight_through vqkd_loss ema",
    "support/codebook.py": "codebook_health ema",
    "pretrain.py": "block_mask aggregation mim_loss",
    "support/guessers.py": "guessers",
    "model.py": "model aggregation",
    "finetune.py": "layer_decay finetune",
    "linprobe.py": "linprobe",
    "support/probe.py": "linprobe",
    "segment.py": "upernet segment",
    "support/run.py": "run loops",
    "support/optim.py": "optim",
    "support/files.py": "files out",
    "support/inputs.py": "inputs",
    "support/data.py": "batches length",
    "support/checks.py": "checks",
    "support/find.py": "find images batches",
    "support/images.py": "images batches",
    "support/shapes.py": "shapes",
    "support/transforms.py": "transforms",
    "support/process.py": "process signals endings",
    "support/scenes.py": "scenes",
    "support/batchnorm.py": "batchnorm",
    "support/weights.py": "weights",
    "support/positions.py": "weights",
    "support/teachers.py": "teachers",
    "support/features.py": "features",
}
RANKS = ("runs::test_two_processes_and_accumulation_train_the_tokenizer_of_one_process_with_"
         "equal_codebooks")
LOOPS = "loops"  # all four training loops, with what they tell optimiser and network
BUGS = {  # file: (what is wrong, the text, the text with the bug in it[, its tests]), ...
    "model.py": [
        ("LayerNorm with torch's eps", "LAYER_NORM_EPS = 1e-6", "LAYER_NORM_EPS = 1e-5"),
        ("GELU by tanh", "F.gelu(self.fc1(x))", "F.gelu(self.fc1(x), approximate='tanh')"),
        ("pixels multiplied by ImageNet's std", "(images - mean) / std", "(images - mean) * std"),
        ("offsets begin at 1", "x[:, None] - x[None, :] + gw - 1", "x[:, None] - x[None, :] + gw"),
        ("offsets are key minus query", "y[:, None] - y[None, :]", "y[None, :] - y[:, None]"),
        (
            "rows of [CLS] swapped",
            "index[0, 0] = rows + 2 ",
            "index[0, 1:], index[1:, 0], index[0, 0] = rows + 1, rows, rows + 2 ",
        ),
        ("queries not scaled", "q * q.shape[-1] ** -0.5", "q"),
        (
            "position bias scaled, too",
            "logits = logits + bias",
            "logits = logits + q.shape[-1] ** -0.5 * bias",
        ),
        (
            "bias of the values on the keys",
            "torch.zeros_like(self.v_bias), self.v_bias]",
            "self.v_bias, torch.zeros_like(self.v_bias)]",
        ),
        (
            "q, k, v apart within each head",
            "3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)",
            "self.heads, 3, D // self.heads).permute(3, 0, 2, 1, 4)",
        ),
        ("attention without its norm", "self.attn(self.norm1(x)", "self.attn(x"),
        (
            "MLP without layer scale",
            "self.mlp(self.norm2(x)), self.gamma_2",
            "self.mlp(self.norm2(x)), None",
        ),
        (
            "queries compute other tokens",
            "q.take_along_dim(queries[:, None, :, None]",
            "q.take_along_dim(queries.flip(1)[:, None, :, None]",
        ),
        ("drop path not rescaled", ".to(x.dtype) / keep", ".to(x.dtype)"),
        ("drop path for each token", "torch.rand(x.shape[0], 1, 1,", "torch.rand(*x.shape[:2], 1,"),
        ("drop path in evaluation", "if rate == 0 or not training", "if rate == 0"),
        (
            "patches column by column",
            "self.proj(x).flatten(2)",
            "self.proj(x).transpose(2, 3).flatten(2)",
        ),
        (
            "mask token on visible patches",
            "torch.where(mask[..., None],",
            "torch.where(~mask[..., None],",
        ),
        (
            "[CLS] hidden, too",
            "self.cls_token.expand(x.shape[0]",
            "(self.cls_token if mask is None else self.mask_token).expand(x.shape[0]",
        ),
        ("absolute positions not added", "else x + self.pos_embed", "else x"),
        (
            "mean with [CLS] in it",
            "self.fc_norm(x[:, 1:].mean(dim=1))",
            "self.fc_norm(x.mean(dim=1))",
        ),
        (
            "norm before the mean",
            "self.fc_norm(x[:, 1:].mean(dim=1))",
            "self.fc_norm(x[:, 1:]).mean(dim=1)",
        ),
        ("[CLS] without the final norm", "return self.norm(x)[:, 0]", "return x[:, 0]"),
        (
            "initial weights not cut",
            "nn.init.trunc_normal_(m.weight, std=std, a=-cut * std, b=cut * std)",
            "nn.init.normal_(m.weight, std=std)",
        ),
        (
            "patch convolution as torch makes it",
            "(convolutions and isinstance(m, nn.Conv2d))",
            "False",
        ),
        (
            "patch convolution normal in all stages",
            "cut=100.0, convolutions=False",
            "cut=100.0, convolutions=True",
        ),
        ("branches rescaled one layer on", "start=first_layer)", "start=first_layer + 1)"),
        (
            "attention's branch not rescaled",
            "block.attn.proj.weight.div_(",
            "(lambda divisor: None)(",
        ),
        (
            "attention never dropped",
            "x = x + self.branch(attended, self.gamma_1)",
            "x = x + self.gamma_1 * attended",
        ),
        (
            "no final norm on the tokens",
            'self.fc_norm(x) if self.pool == "mean" else self.norm(x)',
            "x",
        ),
    ],
    "vqkd.py": [
        ("look-up without l2 of the codes", "v = l2(codebook.float())", "v = codebook.float()"),
        ("look-up in bfloat16", "parts = l2(h.float())", "parts = l2(h.bfloat16().float())"),
        (
            "look-up of the first part alone",
            "for part in parts]",
            "for part in [parts[0]] * len(parts)]",
        ),
        ("straight-through without a way back", "return h + (v - h).detach()", "return v"),
        ("straight-through without sg", "return h + (v - h).detach()", "return h + (v - h)"),
        ("cosine with the wrong sign", "loss = 1 - cosine + beta", "loss = 1 + cosine + beta"),
        (
            "cosine along the patches",
            "F.cosine_similarity(o, t, dim=-1)",
            "F.cosine_similarity(o, t, dim=1)",
        ),
        (
            "the second teacher alone",
            "sum(cosines.values()) / len(cosines)",
            "[*cosines.values()][-1]",
        ),
        ("commitment without sg", "F.mse_loss(h, v.detach())", "F.mse_loss(h, v)"),
        ("codebook term trained, too", "beta * commit\n", "beta * commit + codebook\n"),
        ("moving average weighted by counts", "(1 - decay) * l2(sums)", "(1 - decay) * sums"),
        (
            "moving average without l2",
            "l2(decay * codebook + (1 - decay) * l2(sums))",
            "decay * codebook + (1 - decay) * l2(sums)",
        ),
        (
            "decay and 1 - decay swapped",
            "l2(decay * codebook + (1 - decay) * l2(sums))",
            "l2((1 - decay) * codebook + decay * l2(sums))",
        ),
        (
            "codes chosen once do not move",
            "(counts > 0)[:, None], moved",
            "(counts > 1)[:, None], moved",
        ),
        (
            "k-means centres off the sphere",
            "l2(sums), centres)",
            "sums / counts.clamp(min=1)[:, None], centres)",
        ),
        (
            "empty centres become 0",
            "torch.where((counts > 0)[:, None], l2(sums), centres)",
            "l2(sums)",
        ),
        ("one round of k-means", "in range(iterations)", "in range(1)"),
        (
            "use counted with 1 - decay",
            "mul_(decay).add_(counts, alpha=1 - decay)",
            "mul_(1 - decay).add_(counts, alpha=decay)",
        ),
        ("tokenizer's pixels in [0, 1]", "self.encoder(images * 2 - 1)", "self.encoder(images)"),
        (
            "[CLS] gets a code",
            "self.encoder(images * 2 - 1)[:, 1:]",
            "self.encoder(images * 2 - 1)[:, :-1]",
        ),
        (
            "map of codes transposed",
            "v.transpose(1, 2).unflatten(2, (gh, gw))",
            "v.reshape(len(v), -1, gh, gw)",
        ),
        ("h off the sphere", "h = l2(self.project(images))", "h = self.project(images)"),
        (
            "decoder does not teach the encoder",
            "self.decode(straight_through(h, v))",
            "self.decode(v)",
        ),
        (
            "layer scale in the tokenizer",
            'positions="absolute", layer_scale=0, pool="mean")\n',
            'positions="absolute", layer_scale=0.1, pool="mean")\n',
        ),
        ("k-means start on rank 0 only", "    run.broadcast(weight)\n", "", RANKS),
        (
            "sums and counts of one rank only",
            "run.sum(sums), run.sum(counts)",
            "sums, counts",
            RANKS,
        ),
        ("sums of the last micro-batch only", "sums += more_sums\n", "sums = more_sums\n", RANKS),
        (
            "first codes drawn twice",
            "torch.randperm(len(h), generator=generator)[:codes]",
            "torch.randint(len(h), (codes,), generator=generator)",
        ),
        (
            "k-means of vectors off the sphere",
            "h.append(l2(model.project(",
            "h.append((model.project(",
        ),
        ("codes are dead from the start", "cluster_size.fill_(1.0)", "cluster_size.fill_(0.0)"),
        (
            "quantizer from the first step on",
            "quantize = step >= quantize_from",
            "quantize = True",
            "codebook_health",
        ),
        (
            "batches of an evaluation weigh alike",
            "torch.stack(numbers) * len(images)",
            "torch.stack(numbers)",
            "codebook_health",
        ),
        (
            "rate not scaled by the batch",
            "lr = args.lr * args.batch_size / 128",
            "lr = args.lr",
            LOOPS,
        ),
        ("no warm-up", "run.total_steps, run.warmup_steps)", "run.total_steps)", LOOPS),
        ("beta2 of fine-tuning", "(0.9, args.beta2)", "(0.9, 0.999)", LOOPS),
        ("tokenizer left in training mode", ".eval().requires_grad_(", ".requires_grad_(", LOOPS),
        (
            "codes move before they are looked up",
            "return l2(self.embedding(z)), z",
            "self.update(*code_sums(h, z, len(self.cluster_size)), 0.9)\n"
            "        return l2(self.embedding(z)), z",
        ),
        (
            "gradients of all steps add up",
            "        optimizer.zero_grad(set_to_none=True)\n",
            "",
            LOOPS,
        ),
    ],
    "support/codebook.py": [
        ("entropy in bits", "p.clamp(min=1e-30).log())", "p.clamp(min=1e-30).log2())"),
        ("a collapse is noticed at half of the best", "else (0.2, 0.15)", "else (0.5, 0.15)"),
        ("a warning at every step", "if falling and not self.warned:", "if falling:"),
        ("restarts to the end", "0.8 * run.total_steps", "1.0 * run.total_steps"),
        (
            "living codes restart",
            "(codebook.cluster_size < threshold)",
            "(codebook.cluster_size > threshold)",
        ),
        ("a restarted code stays dead", "codebook.cluster_size[dead] = 1.0", "pass"),
        (
            "a smaller codebook keeps unused codes",
            "descending=True, stable=True",
            "descending=False, stable=True",
        ),
        ("split codes keep the whole use", "(1 + torch.bincount(", "(1 + 0 * torch.bincount("),
        (
            "other heads go on from --init",
            "if heads != model.encoder.heads:",
            "if False:",
            "readers",
        ),
    ],
    "pretrain.py": [
        ("one patch too few hidden", "remaining = count\n", "remaining = count - 1\n"),
        ("last block hides too much", "if 0 < len(new) <= remaining:", "if 0 < len(new):"),
        (
            "more tall blocks than flat ones",
            "math.exp(random.uniform(math.log(0.3), -math.log(0.3)))",
            "random.uniform(0.3, 1 / 0.3)",
        ),
        (
            "no smallest block",
            "random.uniform(min_block, remaining)",
            "random.uniform(1, remaining)",
        ),
        ("[CLS] early, patches late", "[last[:, :1], early[:, 1:]]", "[early[:, :1], last[:, 1:]]"),
        ("layer l counted from 0", "[self.early_layer - 1,", "[self.early_layer,"),
        ("code head without the final norm", "self.lm_head(self.norm(", "self.lm_head(("),
        (
            "shallow head without the final norm",
            "return logits, head(norm(",
            "return logits, head((",
        ),
        ("names the patch before the hidden one", "(last[:, 1:]", "(last[:, :-1]"),
        (
            "shallow head without positions",
            "self.run(self.cls_pt_layers[-1], shallow, bias, queries)",
            "self.run(self.cls_pt_layers[-1], shallow, None, queries)",
        ),
        (
            "the last block computes visible patches",
            "F.pad(1 + hidden, (1, 0))",
            "F.pad(hidden, (1, 0))",
        ),
        (
            "the shallow head of l = L gets hidden patches alone",
            "None if reads_all else queries",
            "queries",
        ),
        (
            "shallow head with the first drop rates",
            "rates[early_layer:early_layer + head_depth]",
            "rates[:head_depth]",
        ),
        ("initial weights cut at 2 std", "init_std, cut=1,", "init_std, cut=2,"),
        (
            "labels smoothed",
            "loss_mim = F.cross_entropy(logits.float(), z)",
            "loss_mim = F.cross_entropy(logits.float(), z, label_smoothing=0.1)",
        ),
        (
            "soft-max taken twice",
            "loss_cls = F.cross_entropy(logits_cls.float(), z)",
            "loss_cls = F.cross_entropy(logits_cls.float().softmax(-1), z)",
        ),
        (
            "one mask for all images",
            "sample_block_mask(*grid, count, min_block).flatten()",
            "(random.seed(0), sample_block_mask(*grid, count, min_block))[1].flatten()",
        ),
        ("second loss not in the sum", "return loss_mim + loss_cls, (", "return loss_mim, ("),
        ("1600 epochs as 300", ">= 1600", "> 1600"),
        (
            "tokenizer gets the backbone's pixels",
            "z = encode(tokenizer_images)",
            "z = encode(imagenet_normalize(tokenizer_images))",
        ),
        ("gradients not clipped", "args.clip_grad or math.inf", "math.inf"),
        (
            "codes of visible patches as targets",
            "z = z.gather(1, hidden).flatten()",
            "z = z[~mask][:hidden.numel()]",
        ),
        ("evaluation with drop path", "    model.eval()\n", "", LOOPS),
        ("training without drop path", "    model.train()\n", "", LOOPS),
        (
            "weight decay not handed on",
            "named_parameters(), args.weight_decay)",
            "named_parameters(), 0)",
            LOOPS,
        ),
        (
            "targets from the masked image",
            "z = encode(tokenizer_images) ",
            "z = encode(tokenizer_images * F.interpolate((~mask).float().view(\n"
            "                    len(mask), 1, *model.grid), tokenizer_images.shape[2:])) ",
        ),
        (
            "targets of the patches before the hidden ones",
            "z = z.gather(1, hidden).flatten()",
            "z = z.roll(1, dims=1).gather(1, hidden).flatten()",
        ),
        (
            "gradients of all steps add up",
            "        optimizer.zero_grad(set_to_none=True)\n",
            "",
            LOOPS,
        ),
    ],
    "support/guessers.py": [
        ("codes counted once a batch", "counts.scatter_add_(1, z.T,", "counts.scatter_(1, z.T,"),
        ("guesses of all patches", "return by_position[mask],", "return by_position,"),
        (
            "the nearest patch may be hidden",
            "torch.cdist(places, places) + mask[:, None, :] * 1e6",
            "torch.cdist(places, places) + 0 * mask[:, None, :]",
        ),
    ],
    "finetune.py": [
        ("layers counted from 0", "return int(part[1]) + 1", "return int(part[1])"),
        (
            "smoothing over other classes only",
            "+ smoothing / classes",
            "+ smoothing / (classes - 1)",
        ),
        (
            "targets not mixed",
            "return mixer(images, labels)",
            "return mixer(images, labels)[0], smooth_targets(labels, classes, smoothing)",
        ),
        ("mixed targets not smoothed", "label_smoothing=smoothing", "label_smoothing=0"),
        ("a ratio for every image", 'mode="batch"', 'mode="elem"'),
        ("CutMix always", "switch_prob=0.5", "switch_prob=1"),
        ("new head at full size", "head.weight.mul_(0.001)", "head.weight.mul_(1.0)"),
        ("a head for other classes kept", "initialise(model.head)  ", "pass  "),
        ("1600 epochs as 300", ">= 1600", "> 1600"),
        (
            "the last evaluation called the best",
            'result["top1"] > self.facts.get("best_top1", -1)',
            "True",
        ),
        (
            "trained on pixels in [0, 1]",
            "network(imagenet_normalize(images))",
            "network(images)",
            LOOPS,
        ),
        (
            "evaluated on pixels in [0, 1]",
            "model.pooled(imagenet_normalize(images))",
            "model.pooled(images)",
            LOOPS,
        ),
        (
            "layer decay not handed on",
            "args.weight_decay, args.layer_decay)",
            "args.weight_decay, 1.0)",
            LOOPS,
        ),
        ("smoothing not handed on", "args.cutmix, args.smoothing)", "args.cutmix, 0)", LOOPS),
        (
            "gradients of all steps add up",
            "        optimizer.zero_grad(set_to_none=True)\n",
            "",
            LOOPS,
        ),
    ],
    "linprobe.py": [
        ("mean with [CLS] in it", "tokens[:, 1:].mean(dim=1)", "tokens.mean(dim=1)"),
        ("no final norm", "tokens.append(norm(tokens[-1]))", "tokens.append(tokens[-1])"),
        (
            "biases decayed",
            "lr_scale=rate, weight_decay=0.0)",
            "lr_scale=rate, weight_decay=decay)",
        ),
        ("held-out images fitted, too", "return order[tenth:],", "return order,"),
        (
            "heads chosen on validation images",
            "score_heads(probe, *train, held * views)",
            "score_heads(probe, *val, torch.arange(len(val_set)))",
        ),
        (
            "the worst setting of a head",
            "held_out[layer, :, h].argmax()",
            "held_out[layer, :, h].argmin()",
        ),
        (
            "[CLS] heads read the patch mean",
            "cls=slice(0, half), mean=slice(half, width)",
            "mean=slice(0, half), cls=slice(half, width)",
        ),
        ("mean left out of the saved head", " - weight @ mean[layer, self.columns]", ""),
        (
            "spread around zero, not the mean",
            "features[part].double() - mean).square()",
            "features[part].double()).square()",
        ),
        ("a negative is no neighbour", "cosine = cosine.abs()", "cosine = +cosine"),
        ("pixels as sharp-eyed as networks", 'source.name == "pixels"', "False"),
        ("few labels, norm of the first layer", "* group.scale[layer]\n", "* group.scale[0]\n"),
        ("pixels with their brightness", "(x - x.mean(dim=1, keepdim=True))", "(x - x.mean())"),
        ("decay per feature, not per image", "x.square().sum() / m", "x.square().sum() / width"),
        ("few labels of validation images", "in (train, val))\n", "in (val, val))\n"),
        ("classes without images are guessed", "y - y.mean(dim=0)", "y - 1 / classes"),
    ],
    "support/probe.py": [
        ("error of the mean without the root", "len(values)**0.5", "len(values)"),
        ("every draw is the first", "args.seed * draws + draw)", "args.seed * draws)"),
    ],
    "segment.py": [
        ("taps one block late", "return depth // 3 - 1,", "return depth // 3,"),
        ("maps aligned at corners", "align_corners=False", "align_corners=True"),
        (
            "[CLS] taken for a patch",
            "tokens[:, 1:].transpose(1, 2)",
            "tokens[:, :-1].transpose(1, 2)",
        ),
        ("levels carried up, not down", "for i in (2, 1, 0):", "for i in (0, 1, 2):"),
        ("levels not smoothed", "layer(levels[i]) for i", "levels[i] for i"),
        (
            "auxiliary head on the finest map",
            "self.auxiliary_head(maps[AUX_TAP])",
            "self.auxiliary_head(maps[0])",
        ),
        ("ignored pixels not below the line", "/ labels.numel()", "/ (labels != IGNORE).sum()"),
        ("[CLS] not decayed", "skip=(), ", ""),
        ("heads learn as slowly as the embeddings", "else depth + 1\n", "else 0\n"),
        ("rate falls by a square", "base * (1 - step / total)", "base * (1 - step / total) ** 2"),
        ("last window beyond the image", "min(i * stride, side - window)", "i * stride"),
        ("overlaps added up", "return total.div_(times)", "return total"),
        ("mirrored logits not turned back", "window, stride).flip(-1)\n", "window, stride)\n"),
        (
            "confusion transposed",
            "labels[known].long() * classes + predicted[known]",
            "predicted[known].long() * classes + labels[known]",
        ),
        ("absent classes count as 0", "miou=iou.nanmean()", "miou=iou.nan_to_num().mean()"),
        ("auxiliary loss in full", "loss_main + AUX_WEIGHT * loss_aux", "loss_main + loss_aux"),
        ("windows half a crop apart", "side * 2 / 3", "side / 2"),
        (
            "images fitted to a square",
            "4 * min(window) * scale, min(window)",
            "min(window) * scale, min(window)",
        ),
        (
            "ReLU in the pyramid",
            "nn.BatchNorm2d(vit.width), nn.GELU()",
            "nn.BatchNorm2d(vit.width), nn.ReLU()",
        ),
        (
            "single pixels dropped",
            "self.dropout = nn.Dropout2d(DROPOUT)",
            "self.dropout = nn.Dropout(DROPOUT)",
        ),
        (
            "predicts from pixels in [0, 1]",
            "F.pad(imagenet_normalize(view),",
            "F.pad((view),",
            LOOPS,
        ),
        (
            "training without BatchNorm's batch",
            "    model.train()\n    return scores",
            "    return scores",
            LOOPS,
        ),
        (
            "gradients of all steps add up",
            "        optimizer.zero_grad(set_to_none=True)\n",
            "",
            LOOPS,
        ),
    ],
    "support/scenes.py": [
        ("labels interpolated", "size, NEAREST)[0]", "size, BILINEAR)[0]"),
        ("bands half a row too low", "(rows + 0.5) *", "rows *"),
        ("a band leaves a row out", "range(0, size[0], rows)", "range(0, size[0], rows + 1)"),
        (
            "labels not flipped",
            "image, labels = image.flip(-1), labels.flip(-1)",
            "image = image.flip(-1)",
        ),
        ("padding is a class", "border, fill=IGNORE)", "border, fill=0)"),
        ("padding is black", "fill=mean)", "fill=0)"),
        ("ADE labels not shifted", "numbers.astype(np.int64) - first", "numbers.astype(np.int64)"),
        ("images never enlarged", "(self.jitter - 1 / self.jitter)", "(1 - 1 / self.jitter)"),
        (
            "ignored pixels in cat_max",
            "counts.max() / counts.sum() <",
            "counts.max() / labels.numel() <",
        ),
        ("hue over the whole circle", "torch.randint(-18, 18, ())", "torch.randint(-90, 90, ())"),
        ("saturation beyond full colour", "most.clamp(max=factor)", "factor"),
    ],
    "support/batchnorm.py": [
        ("statistics added up, not averaged", ".div_(process.world_size)", ""),
    ],
    "support/run.py": [
        (
            "ranks keep their gradients",
            "k == self.accumulation - 1",
            "k != self.accumulation - 1",
            RANKS,
        ),
        (
            "gradients summed over micro-batches",
            "(loss / self.accumulation).backward()",
            "loss.backward()",
        ),
        ("a resumed run begins at step 0", 'self.step = self.resumed["step"]', "self.step = 0"),
        ("the first resume file is not kept", 'previous=f"{path}.prev"', "previous=None"),
        (
            "a loss that is no number goes unnoticed",
            "loss.detach().isfinite()",
            "loss.detach() == loss.detach()",
        ),
        (
            "micro-batches share one seed",
            "self.step, self.rank, k)",
            "self.step, self.rank, 0)",
            "run",
        ),
    ],
    "support/inputs.py": [
        ("tensors do not count", "p.file_size, p.CRC)", "p.file_size)"),
        ("labels do not count", "os.path.relpath(path, root)", "os.path.basename(path)"),
        ("label maps are known by size", "small or path.startswith(label_maps)", "small"),
        ("changed inputs count as the same", "in now and was[name] != now[name]", "not in now"),
    ],
    "support/files.py": [
        ("a flipped bit goes unnoticed", "damaged = archive.testzip()", "damaged = None"),
        (
            "a checkpoint is written in place",
            'temporary = Path(f"{path}.tmp")\n    try',
            "temporary = path\n    try",
        ),
        (
            "a resumed log keeps later steps",
            '.get("step", -1) < start_step',
            '.get("step", -1) >= -1',
        ),
        ("a worker gives the lock up", " or os.getpid() != self.pid", ""),
        ("--fresh moves all files", "if OURS.fullmatch(f.name)", "if f.name"),
        ("--fresh moves what others write", 'for f in out.glob("*.lock") if', "for f in [] if"),
    ],
    "support/optim.py": [
        ("warm-up a step longer", "step / max(1, warmup - 1)", "step / max(1, warmup)"),
        (
            "cosine reaches the final rate",
            "(step - warmup) / (total - warmup)",
            "(step - warmup) / (total - warmup - 1)",
        ),
        ("biases and norms decayed", 'parameter.ndim == 1 or last_part == "bias" or ', ""),
        ("[CLS] and positions decayed", 'skip=("cls_token", "pos_embed")', "skip=()"),
        (
            "mask token not decayed",
            'skip=("cls_token", "pos_embed")',
            'skip=("cls_token", "pos_embed", "mask_token")',
        ),
        (
            "layer decay off by one",
            "layer_decay ** (depth + 1 - layer)",
            "layer_decay ** (depth - layer)",
        ),
        ("lr_scale without effect", 'lr * group["lr_scale"]', "lr"),
        ("eps of AdamW", "eps=1e-8, fused", "eps=1e-6, fused"),
    ],
    "support/data.py": [
        ("pixels divided by 256", ".div_(255)", ".div_(256)", "run"),
        ("unequal micro-batches", "while per_rank % accumulation:", "while False:", "run"),
        (
            "resumed runs begin at step 0",
            "in range(self.start_step, self.steps):",
            "in range(self.steps - self.start_step):",
        ),
        (
            "ranks overlap in accumulation",
            "self.rank * self.accumulation * self.micro_batch",
            "self.rank * self.micro_batch",
        ),
        (
            "ranks take every other image",
            "in order[start:start + self.micro_batch]",
            "in order[self.rank + start - first + place * self.batch_size:][::self.batch_size"
            " // (self.micro_batch * self.accumulation)][:self.micro_batch]",
        ),
        (
            "evaluation fills up the shares",
            "last = n * (rank + 1) // world_size\n",
            "last = min(n, n * rank // world_size + -(-n // world_size))\n",
        ),
        (
            "an incomplete batch ends the epoch",
            "return images // batch_size",
            "return -(-images // batch_size)",
        ),
        ("every epoch in the same order", "1_000_003 * self.seed + epoch", "1_000_003 * self.seed"),
        ("a typed warm-up shrinks", 'elif "warmup_epochs" in typed(args):', "elif False:"),
        ("a typed count shrinks", "if name in typed(args) or steps", "if steps"),
        (
            "short epochs keep a long warm-up",
            "warmup_epochs * min(1, args.epochs / recipe_epochs) * per_epoch",
            "warmup_epochs * per_epoch",
        ),
        ("a smaller batch may be odd", "unit = 2 * parts", "unit = parts"),
    ],
    "support/images.py": [
        ("a fourth channel is dropped in silence", "    refuse_bands(image)\n", ""),
        (
            "a sample alike in every epoch",
            "seed_all(self.seed, epoch, index)",
            "seed_all(self.seed, index)",
        ),
        ("transparency dropped", "if image.has_transparency_data:", "if False:"),
        ("16 bits cut off", "(levels / 257)", "(levels % 256)"),
        ("photographs not turned upright", "ImageOps.exif_transpose(image, in_place=True)", "pass"),
        ("a limit takes the first images", "np.linspace(0, n - 1, count)", "np.arange(count)"),
    ],
    "support/find.py": [
        (
            "held-out images stay in training",
            '(i % 20 == 0) == (split == "val")',
            'i % 20 == 0 or split == "train"',
        ),
        (
            "other files are dropped in silence",
            "        if reason:\n            left_out.add(reason, os",
            "        if reason:\n            LeftOut().add(reason, os",
        ),
        (
            "folders of label maps are taken for images",
            "            found.add(name)\n    return found\n\n\ndef label_files",
            "            pass\n    return found\n\n\ndef label_files",
        ),
        ("masks beside no images are left out", "known.intersection(beside) or", "True or"),
        (
            "a composed name is another name",
            'unicodedata.normalize("NFC", name)',
            "name",
        ),
        ("an editor's mark belongs to the text", '"utf-8-sig"', '"utf-8"'),
    ],
    "support/checks.py": [
        ("images of one colour pass", "if len(flat) == len(chosen) and", "if False and"),
        ("one class passes", "if len(dataset.classes) == 1:", "if False:"),
        ("a sample without labels passes", "if len(classes) > 1 or (", "if True or ("),
        ("train ids pass", "if all(n in pixels for n in range(1, last)):", "if False:"),
        (
            "a constant teacher passes",
            "(0, 1))).abs().max() <= 1e-5 * scale",
            "(0, 1))).abs().max() < 0",
        ),
    ],
    "support/shapes.py": [
        ("shapes not turned", 'np.deg2rad(f["rotation"])', '0 * f["rotation"]'),
        ("background always darker", "brighter = u[:, 8] < 0.5", "brighter = u[:, 8] < 2"),
        ("classes follow from the index", "labels = (index + first) % 10", "labels = index % 10"),
        (
            "every image has the same noise",
            "hashed(seed, split, noise_of, 2,",
            "hashed(seed, split, 0 * np.asarray(noise_of), 2,",
        ),
        (
            "hues change the brightness",
            "np.cos(TURN * (hue[:, None] - third))",
            "np.cos(TURN * (hue[:, None] - third) / 2)",
        ),
    ],
    "support/transforms.py": [
        (
            "tokenizer gets another window",
            "view = VF.resize(pixels,",
            "view = VF.resize(pixels.roll(size // 48 - 1, -1),",
        ),
        (
            "windows of an oblong view have the aspects of a square",
            "3 / 4 * self.aspect, 4 / 3 * self.aspect",
            "3 / 4, 4 / 3",
            "oblong",
        ),
        ("centre crop without a margin", "side * 256 // 224", "side"),
        ("erased before normalising", '= mean + std * box["v"]', '= box["v"]'),
        ("jitter squares the factor", "mul_(factor).add_(mean", "mul_(factor * factor).add_(mean"),
        ("contrast around each pixel", ".add_(mean, alpha", ".add_(grey_of(part), alpha"),
        (
            "contrast around the window's mean",
            "jitter(pixels, whole, *drawn)",
            "jitter(pixels, pixels, *drawn)",
        ),
        ("mirrored images show another window", 'window["left"] = image.shape', "_ = image.shape"),
        ("photographs decoded too coarsely", "room >= 2 * s * MARGIN", "room >= 2 * s"),
        ("windows begin a coarse pixel late", 'round(window["left"] / s)',
         'window["left"] // s + (s > 1)'),
        ("magnitudes mean other strengths", "translate_pct=0.45", "translate_pct=0.3"),
    ],
    "support/process.py": [
        ("bf16 without effect", 'enabled=self.amp == "bf16"', "enabled=False"),
        ("masks not seeded", "    random.seed(value)\n", ""),
        ("a second signal ends at once", "impatient = number == signal.SIGINT and", "impatient ="),
        ("nohup without effect", "ignored = signal.getsignal(number) ==", "ignored = None =="),
        ("workers leave at any SIGTERM", ".si_pid != os.getppid()", ".si_pid < 0"),
        (
            "a closed stream ends the run",
            "except (OSError, ValueError):        # ValueError: it was closed",
            "except Warning:",
        ),
    ],
    "support/positions.py": [
        (
            "tables resized linearly",
            "kx=min(3, sides[0] - 1), ky=min(3, sides[1] - 1)",
            "kx=1, ky=1",
        ),
        ("rows of [CLS] swapped in resizing", "table[-3:]])", "table[-3:].flip(0)])"),
        ("geometric grid too wide", "> target - 1:", "> target:"),
        ("sides of a table swapped", "head.reshape(sides)", "head.reshape(sides[::-1]).T"),
        ("positions resized linearly", 'mode="bicubic"', 'mode="bilinear"'),
    ],
    "support/weights.py": [
        ("tokenizer's pixel range forgotten", 'if checkpoint.kind == "vqkd":', "if False:"),
        (
            "MLP ratio assumed",
            "depth=depth, mlp_ratio=mlp_ratio(weights),",
            "depth=depth, mlp_ratio=4.0,",
            "readers",
        ),
        (
            "decoder's MLP ratio is the encoder's",
            'mlp_ratio(weights, "decoder.")',
            'mlp_ratio(weights, "encoder.")',
            "readers",
        ),
        ("stated early layer ignored", 'stated.get("early_layer") or', "None or", "readers"),
        ("early layer is the last", "max(1, depth * 3 // 4)", "depth", "readers"),
        (
            "every grid is square",
            'stated.get("image_size", side * patch)',
            "side * patch",
            "readers",
        ),
        (
            "heads assumed to be 64 wide",
            'stated.get("heads", width // 64)',
            "width // 64",
            "readers",
        ),
        (
            "index of another grid",
            "relative_position_index(*part.grid)",
            "relative_position_index(*part.grid[::-1])",
            "readers",
        ),
    ],
    "support/teachers.py": [
        ("HOG over 360 degrees", "(self.bins / math.pi)", "(self.bins / (2 * math.pi))"),
        ("HOG votes for one bin only", "upper = length * (angle - low)", "upper = 0 * length"),
        ("HOG not centred", "t = t - t.mean(dim=-1, keepdim=True)", "t = 1 * t"),
        (
            "pixel targets keep their mean",
            "return (patches - mean) / (var",
            "return patches / (var",
        ),
        ("CLIP's [CLS] taken for a patch", "tower.ln_post(x)[:, 1:]", "tower.ln_post(x)[:, :-1]"),
        ("registers taken for patches", "[:, self.skip:]", "[:, 1:]"),
    ],
    "support/features.py": [
        ("mirror images with plain features", "[images, images.flip(-1)]", "[images, images]"),
        ("crops of one epoch only", "self.crops[(view - 1, index)]", "self.crops[(0, index)]"),
        ("other weights, same file", "digest.update(tensor.cpu()", "len(tensor.cpu()"),
        (
            "each process writes from the first row",
            "batches[0][0] * row_bytes",
            "0 * row_bytes",
            "features::test_two_processes_write_the_file_of_one",
        ),
    ],
}


def path_of(match):
    """tests/test_NAME.py, or the one in tests/machinery."""
    path = f"tests/test_{match[0]}.py"
    return path if (ROOT / path).exists() else path.replace("tests/", "tests/machinery/", 1)


def selected(words=()):
    """-> [(file, bug, old, new, tests)], tests as pytest wants them."""
    every = [
        (
            file,
            bug,
            old,
            new,
            [
                re.sub(r"^\w+", path_of, name)
                for test in tests or [TESTS[file]]
                for name in test.split()
            ],
        )
        for file, bugs in BUGS.items()
        for bug, old, new, *tests in bugs
    ]
    return [
        b
        for b in every
        if not words or any(word.lower() in f"{b[0]} {b[1]}".lower() for word in words)
    ]


def with_bug(file, old, new):
    """The text of the file with the bug in it."""
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        raise SystemExit(
            f"{file} holds {text.count(old)} times, not once, what a bug of "
            f"tests/mutate.py changes "
            f"({old!r}): let the list follow the code"
        )
    return text.replace(old, new)


class FirstFailure:
    """A plugin of pytest that remembers which test failed first."""

    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.name is None:
            self.name = report.nodeid.removeprefix("tests/")


def too_long(*_):
    raise TimeoutError(f"no end after {LIMIT} s")  # within a test, which then fails


def try_tests(send, tests, golden, file=None, text=None):
    """pytest on a fresh copy of the project in which `file` has become `text`.

    Sends (first failing test or None, seconds), or what pytest said if it could not run. Runs in a
    process of its own that knows nothing of the project.
    """
    begin, first, sys.dont_write_bytecode = time.time(), FirstFailure(), True
    sys.path[:] = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests")]
    os.environ |= dict(
        OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"
    )
    if not golden:
        os.environ.pop("BEIT2_GOLDEN", None)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        copy = Path(folder) / "project"
        shutil.copytree(
            ROOT,
            copy,
            ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "datasets", "*.pt"),
        )
        if file:
            (copy / file).write_text(text)
        os.chdir(copy)
        slow = [] if "::" in tests[0] else ["-m", "not slow"]
        code = pytest.main(
            ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *slow, *tests], plugins=[first]
        )
        os.chdir("/")
        ran = code == (
            1 if first.name else 0
        )  # 1: a test failed; other codes: there was none to run
        send.send(
            (first.name, round(time.time() - begin, 1))
            if ran
            else Path(output.name).read_text()[-3000:]
        )


def side_by_side(jobs, calls):
    """Yields (number, result of try_tests) for many arguments, `jobs` of them at a time."""
    fork, waiting, running = multiprocessing.get_context("fork"), list(enumerate(calls)), {}
    for name in "numpy scipy.interpolate torch torchvision.transforms.v2 timm open_clip".split():
        importlib.import_module(name)  # once for all, as this takes most of the time
    while waiting or running:
        while waiting and len(running) < jobs:
            (i, call), (receive, send) = waiting.pop(0), fork.Pipe(duplex=False)
            fork.Process(target=try_tests, args=(send, *call)).start()
            send.close()
            running[receive] = i
        for receive in multiprocessing.connection.wait(list(running)):
            result, i = receive.recv(), running.pop(receive)
            if isinstance(result, str):
                raise SystemExit(f"{calls[i]}: the tests did not run\n{result}")
            yield i, result


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "words", nargs="*", help="only bugs with one of these words in their file or name"
    )
    p.add_argument("--list", action="store_true", help="print the bugs and stop")
    p.add_argument("--jobs", type=int, default=2, help="bugs tried at the same time")
    p.add_argument(
        "--golden",
        action="store_true",
        help="run the tests against the authors' tensors, and no others",
    )
    p.add_argument(
        "--write",
        action="store_true",
        help="write results/mutations.md and results/mutations.jsonl",
    )
    args = p.parse_args()
    bugs, begin = selected(args.words), time.time()
    if args.list:
        print("\n".join(f"{file:12} {bug}" for file, bug, *_ in bugs))
        return
    golden = ["tests/test_golden.py", "tests/test_golden_finetune.py"] if args.golden else None
    lines = [dict(file=file, bug=bug, old=old, new=new) for file, bug, old, new, _ in bugs]
    for i, (by, seconds) in side_by_side(
        args.jobs,
        [
            (golden or tests, args.golden, file, with_bug(file, old, new))
            for file, _, old, new, tests in bugs
        ],
    ):
        lines[i] |= dict(noticed=bool(by), by=by, seconds=seconds)
        print(f"{lines[i]['file']:12} {lines[i]['bug']:40} {by or 'SURVIVES'}", flush=True)
    named = sorted({f"tests/{line['by']}" for line in lines if line["by"]})
    for _, (fails, _) in side_by_side(1, [(named, args.golden)] if named else []):
        if fails:
            raise SystemExit(f"{fails} fails without any bug, too: mend that first")
    noticed, seconds = sum(line["noticed"] for line in lines), round(time.time() - begin)
    score = f"{noticed} of {len(lines)} bugs ({100 * noticed / len(lines):.1f} %)"
    print(f"{score} noticed, {seconds} s")
    if args.write and not args.words and not golden:
        sys.path.insert(0, str(ROOT))        # only now: a fork must not know the project
        from results import make, tables
        facts = dict(seconds=seconds, jobs=args.jobs)
        facts |= tables.about("python tests/mutate.py --write")
        tables.write_lines(ROOT / "results" / "mutations.jsonl", [facts, *lines])
        make.main(["mutations"])


if __name__ == "__main__":
    main()
