"""Draw pictures from words with the model that comes with the package, offline and on any CPU.

python examples/text_to_image.py "red apple" "dog face" --out pictures.png
"""

import argparse

from PIL import Image

import ldm_fast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="*", default=["red apple", "dog face", "umbrella with rain drops"])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, help="default: what the model's card recommends")
parser.add_argument("--out", default="pictures.png")
args = parser.parse_args()

model = ldm_fast.LatentDiffusion.load()  # a path here opens your own model, or a Stable Diffusion checkpoint
print(ldm_fast.explain())  # which implementation each op runs on this machine

images = model.generate(args.prompts, seed=args.seed, steps=args.steps)  # uint8 (B, H, W, 3)

# Image i draws its random numbers only from seed + i, so it is the same in any batch.
alone = model.generate(args.prompts[-1:], seed=args.seed + len(args.prompts) - 1, steps=args.steps)
assert (alone[0].int() - images[-1].int()).abs().max() <= 1  # a larger matrix product may round differently

row = images.transpose(0, 1).flatten(1, 2)  # side by side: (H, B * W, 3)
Image.fromarray(row.numpy()).save(args.out)
print(f"{len(images)} pictures in {args.out}")
