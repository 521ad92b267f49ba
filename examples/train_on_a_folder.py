"""Train both stages on a folder of captioned pictures, then draw from words with the result.

python examples/train_on_a_folder.py --pictures my_pictures --run-dir runs/mine

Captions are text files beside the pictures (cat.png, cat.txt). Without --pictures the script draws some coloured shapes
first. The recipe, train_on_a_folder.toml, is far too small for real pictures. For those, start from the shipped one,
ldm_fast/training/recipes/emoji.toml.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw

import ldm_fast
from ldm_fast.training import load_recipe, train

RECIPE = Path(__file__).with_suffix(".toml")


def draw_shapes(folder: Path) -> None:
    """Discs and squares in three colours and five sizes, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for colour in ("red", "green", "blue"):
        for shape in ("disc", "square"):
            for size in range(8, 13):
                picture = Image.new("RGB", (32, 32), "white")
                pen = ImageDraw.Draw(picture)
                box = (16 - size, 16 - size, 16 + size, 16 + size)
                (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=colour)
                picture.save(folder / f"{colour}_{shape}_{size}.png")
                (folder / f"{colour}_{shape}_{size}.txt").write_text(f"{colour} {shape}")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pictures", type=Path, help="a folder of pictures with captions")
parser.add_argument("--run-dir", type=Path, default=Path(tempfile.gettempdir()) / "ldm_fast_shapes")
parser.add_argument("--steps", type=int, help="steps of each stage (default: the recipe's)")
parser.add_argument("--prompts", nargs="*", default=["red disc", "blue square"])
args = parser.parse_args()

pictures = args.pictures or args.run_dir / "pictures"
if args.pictures is None:
    draw_shapes(pictures)
recipe = load_recipe(RECIPE)
recipe = replace(recipe, data=replace(recipe.data, path=str(pictures)))
if args.steps is not None:
    stages = recipe.first_stage, recipe.second_stage
    first, second = (replace(stage, loop=replace(stage.loop, steps=args.steps)) for stage in stages)
    recipe = replace(recipe, first_stage=first, second_stage=second)

# You may stop it at any time, even with kill -9. The same call then goes on where it stopped, bit for bit.
path = train(recipe, args.run_dir / "run")

model = ldm_fast.LatentDiffusion.load(path)
images = model.generate(args.prompts, seed=0)  # uint8 (B, 32, 32, 3)
Image.fromarray(images.transpose(0, 1).flatten(1, 2).numpy()).save(args.run_dir / "drawn.png")
print(f"{path}: {len(images)} pictures in {args.run_dir / 'drawn.png'}")
