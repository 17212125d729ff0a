"""A tour of the method in ten minutes on a CPU, as a script or as a notebook.

    python -m assignments.tour                          # runs it; pictures go to runs/tour
    python -m assignments.tour --notebook tour.ipynb    # writes the notebook, runs nothing

tour.ipynb beside this file is made by the second command. Lines up to the first marker `# %%` are
not in the notebook.
"""
import sys

if sys.argv[1:]:
    from assignments.notebook import write
    from support.process import launch
    launch(lambda: write(__file__))
    sys.exit()

# %% [markdown]
# # BEiT v2 in ten minutes
#
# You train a small tokenizer, look at its tokens, break its codebook, hide patches of images,
# and let a network name what was there. A CPU is enough. The images are drawn by formula, so
# nothing is downloaded but the project itself.
#
# You change things here. What you read is in the files: `vqkd.py` for parts 1 to 4,
# `pretrain.py` for parts 5 and 6.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

ADDRESS = ""             # where to clone this project from, if it is not here (on Colab)

if importlib.util.find_spec("vqkd") is None:
    places = [Path.cwd(), Path.cwd().parent, Path("beit2").resolve()]
    if not any((place / "vqkd.py").is_file() for place in places):
        assert ADDRESS, "put the address of this project's repository into ADDRESS"
        subprocess.run(["git", "clone", ADDRESS, "beit2"], check=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-r",
                        "beit2/requirements.txt"], check=True)
    sys.path.insert(0, str(next(p for p in places if (p / "vqkd.py").is_file())))

# %%
import matplotlib.pyplot as plt
import torch

import pretrain
import vqkd
from extras import visualize
from extras.codes import code_colours
from support.codebook import codebook_usage
from support.shapes import Shapes

OUT = Path("runs/tour")


def run(stage, *flags):
    """A stage, as from the command line. If it has finished before, it only says so."""
    try:
        stage.main([str(flag) for flag in flags])
    except SystemExit as done:
        if done.code:
            raise


def show(path):
    """A picture in a notebook. A script only names its file."""
    if "get_ipython" in globals():           # every notebook has it
        from IPython.display import Image, display
        display(Image(filename=str(path)))
    else:
        print(f"picture: {path}")


# %% [markdown]
# ## 1. Train a tokenizer (half a minute)
#
# Stage 1 of the paper, Section 2.2. An encoder turns each patch into a vector h. The nearest of
# 64 codes takes its place. A decoder has to predict a *teacher's* features from the codes
# alone. The paper's teacher is CLIP; here it is HOG, a description of outlines that needs no
# weights.
#
# In the first 100 steps the quantizer is left out. Then `perplexity` appears: the number of
# codes that are really in use.

# %%
run(vqkd, "--steps", 400, "--continuous-steps", 100, "--warmup-epochs", 0.2, "--workers", 0,
    "--out", OUT)

# %% [markdown]
# ## 2. Encode an image and see its tokens
#
# An image of 48 x 48 pixels has 6 x 6 patches. Each becomes one number from 0 to 63.

# %%
tokenizer = vqkd.load_tokenizer(OUT / "vqkd.pt")
images = Shapes("val", limit=200).images                 # (200, 3, 48, 48) uint8
NUMBER = 3                                               # try others

image = images[NUMBER]
z = tokenizer.encode(image[None] / 255)                  # (1, 36)
tokens = z.view(6, 6)
print(tokens)

colours = code_colours(tokenizer.quantize.embedding.weight)      # similar codes, similar colours
figure, (left, right) = plt.subplots(1, 2, figsize=(6, 3))
left.imshow(image.permute(1, 2, 0))
right.imshow(colours[tokens])
for y in range(6):
    for x in range(6):
        code = int(tokens[y, x])
        dark = colours[code].mean() < 0.4
        right.text(x, y, code, color="white" if dark else "black", ha="center",
                   va="center", fontsize=8)
for axis in (left, right):
    axis.axis("off")
figure.savefig(OUT / "tokens.png", dpi=120)
plt.close(figure)
show(OUT / "tokens.png")

# %% [markdown]
# **Try it.** Make the image darker (`image // 2`) or turn its colours round (`255 - image`) and
# encode it again. Which tokens stay? HOG looks at outlines. Would the tokens of a pixel teacher
# stay, too?
#
# ## 3. What does a code stand for?
#
# Each row is one code: first the mean of its patches, then patches of different images that got
# it.

# %%
visualize.main([str(OUT), "--only", "codes", "--limit", "500", "--out", str(OUT)])
show(OUT / "codes.png")

# %% [markdown]
# ## 4. Break the codebook
#
# First by hand. Suppose that l2 is forgotten and that one code is ten times longer than the
# others. The product h . v is then no longer a cosine. Which code does it choose?

# %%
with torch.no_grad():
    h = tokenizer.project(images / 255)                  # (200, 36, 16)
    v = tokenizer.quantize.embedding.weight.clone()      # (64, 16), all of length 1
    v[7] *= 10
    right_z = vqkd.nearest_code(h, v)                    # l2 first: the length does not matter
    wrong_z = (h @ v.T).argmax(dim=-1)                   # l2 forgotten
for name, ids in (("with l2", right_z), ("without", wrong_z)):
    usage = codebook_usage(torch.bincount(ids.flatten(), minlength=64))
    print(f"{name:8}  codes used {usage['codes_used']:2}, perplexity {usage['perplexity']:4.1f}")

# %% [markdown]
# Now by training. The settings below are naive: a high rate without warm-up, the quantizer from
# the first step, slow codes. A warning comes early. Then look at both curves of the perplexity.
# Codes that no vector chooses do not move, and the encoder pulls all vectors to the few codes
# that are left.

# %%
run(vqkd, "--steps", 60, "--continuous-steps", 0, "--warmup-epochs", 0, "--decay", 0.99,
    "--restart-dead-codes", 0, "--lr", 3e-3, "--batch-size", 64, "--micro-batch", 64,
    "--log-every", 1, "--workers", 0, "--out", OUT / "broken")
logs = [str(folder / "vqkd.jsonl") for folder in (OUT, OUT / "broken")]
visualize.main([*logs, "--out", str(OUT / "collapse.png")])
show(OUT / "collapse.png")

# %% [markdown]
# **Try it.** Mend it with one flag at a time: `--warmup-epochs 0.5`, a lower `--lr`, `--decay
# 0.97`. Give each try an `--out` of its own. Which one helps most?
#
# ## 5. Hide patches and name them (two minutes)
#
# Stage 2, Section 2.3. 13 of 36 patches are hidden. The network names their codes, once from
# its last layer and once through the shallow head that knows the image only through [CLS]. A
# network that knows nothing pays ln 64 = 4.16 in each head.
#
# The loss rests for a while at the entropy of the codes. Then it falls.

# %%
run(pretrain, "--steps", 900, "--warmup-epochs", 0.5, "--workers", 0, "--out", OUT)
visualize.main([str(OUT / "pretrain.jsonl"), "--out", str(OUT / "curves.png")])
show(OUT / "curves.png")

# %% [markdown]
# ## 6. See a prediction
#
# Each row: the image, what the network sees, the true codes, and what both heads say. Every
# code is drawn as the mean of its patches. Green frames are right, red ones are wrong. Look at
# the wrong ones: how far off are they?

# %%
visualize.main([str(OUT), "--only", "prediction", "--limit", "500", "--out", str(OUT)])
show(OUT / "prediction.png")

# %% [markdown]
# ## Where to go from here
#
# * `assignments/reading.md`: the paper section by section, beside the code.
# * `results/mistakes.md`: what eight mistakes look like in training.
# * `python vqkd.py`, `python pretrain.py`, `python linprobe.py`: the same at full length, with
#   the probe that tells what was learned.
# * Your own images: `python -m extras.features runs/tour/vqkd.pt photos/` writes their tokens.
