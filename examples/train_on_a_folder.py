"""Train both stages on a folder of captioned pictures, then draw from words with the result.

python examples/train_on_a_folder.py --pictures my_pictures --run-dir runs/mine

Captions are text files beside the pictures (cat.png, cat.txt). Without --pictures the script draws some coloured shapes
first. The recipe is far too small for real pictures: copy the shipped one (`ldm-fast train --help` lists it) for those.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

import ldm_fast
from ldm_fast.training import parse_recipe, train

RECIPE = """
name = "shapes"
seed = 0

[data]
kind = "folder"
path = "{path}"
size = 32
held_out = 0.1

[first_stage.vq]
block_out_channels = [16, 32, 32]
layers_per_block = 1
num_vq_embeddings = 64
norm_num_groups = 8

[first_stage.loop]
steps = {steps}
batch_size = 8
learning_rate = 2e-3
ema_decay = 0.98

[second_stage]
condition = "text"

[second_stage.unet]
sample_size = 8
in_channels = 3
out_channels = 3
block_out_channels = [32, 64]
down_block_types = ["DownBlock2D", "CrossAttnDownBlock2D"]
layers_per_block = 1
cross_attention_dim = 32
num_attention_heads = 4
norm_num_groups = 8

[second_stage.text]
width = 32
depth = 1
heads = 4
head_dim = 8
max_length = 8

[second_stage.loop]
steps = {steps}
batch_size = 16
learning_rate = 1e-3
ema_decay = 0.98

[second_stage.sampling]
steps = 20
guidance = 3.0
"""


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
parser.add_argument("--steps", type=int, default=300, help="of each stage")
parser.add_argument("--prompts", nargs="*", default=["red disc", "blue square"])
args = parser.parse_args()

pictures = args.pictures or args.run_dir / "pictures"
if args.pictures is None:
    draw_shapes(pictures)
recipe = parse_recipe(RECIPE.format(path=pictures.as_posix(), steps=args.steps))

# Stop it when you like, even by kill -9: the same call goes on where it was, bit for bit.
path = train(recipe, args.run_dir / "run")

model = ldm_fast.LatentDiffusion.load(path)
images = model.generate(args.prompts, seed=0)  # uint8 (B, 32, 32, 3)
Image.fromarray(images.transpose(0, 1).flatten(1, 2).numpy()).save(args.run_dir / "drawn.png")
print(f"{path}: {len(images)} pictures in {args.run_dir / 'drawn.png'}")
