"""The commands, called in this process on a tiny random model; above all what they do with bad input."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_models
import torch
from PIL import Image

import ldm_fast
from ldm_fast.cli import commands, main
from ldm_fast.configs.diffusion import Defaults
from ldm_fast.configs.encoders import ClassEmbedderConfig
from ldm_fast.diffusion.samplers import SAMPLERS
from ldm_fast.files import images as pictures
from ldm_fast.models.encoders import ClassEmbedder
from ldm_fast.models.unet import UNet
from ldm_fast.pipelines.latent_diffusion import LatentDiffusion


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    model = small_models.text_model(defaults=Defaults(steps=2, guidance=2.0))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def class_model_path(model_path):
    """Five classes, the last of which stands for no condition; two have names."""
    model = LatentDiffusion.load(model_path)
    model.cond_stage = ClassEmbedder(ClassEmbedderConfig(num_classes=5, width=16, null_class=4))
    model.card["classes"] = ["cat", "dog"]
    path = model_path.with_name("classes.safetensors")
    model.save(path)
    return path


@pytest.fixture(scope="module")
def unconditional_model_path(model_path):
    model = LatentDiffusion.load(model_path)
    unet = {"down_block_types": ("DownBlock2D",) * 2, "mid_block_type": "UNetMidBlock2D", "cross_attention_dim": None}
    model.unet = UNet(replace(model.unet.config, **unet))
    model.cond_stage = model.conditioning_key = None
    path = model_path.with_name("unconditional.safetensors")
    model.save(path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(model_path, folder, capsys):
    """Runs a command on the tiny model: (exit code, stdout, stderr)."""

    def call(*arguments):
        arguments = [str(a) for a in arguments]
        if arguments[0] in ("generate", "reconstruct", "evaluate") and "--model" not in arguments:
            arguments += ["--model", str(model_path)]
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


def photo(path, size=(16, 16), mode="RGB"):
    values = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(values.numpy()).convert(mode).save(path)
    return path


def test_generate_writes_a_picture_with_its_settings(run, folder):
    code, out, err = run("generate", "red apple", "--out", "apple.png", "--seed", 3, "--negative", "tree")
    assert (code, err) == (0, "") and out.startswith("apple.png: 16x16 pixels")
    with Image.open("apple.png") as picture:
        assert picture.size == (16, 16) and picture.mode == "RGB"
        text = picture.text
    expected = {"prompt": "red apple", "negative": "tree", "seed": "3", "steps": "2", "guidance": "2.0"}
    expected |= {"sampler": "ddim", "size": "16x16", "software": f"ldm_fast {ldm_fast.__version__}"}
    assert text.pop("model").startswith("tiny.safetensors sha256:")
    assert text == expected
    assert [p.name for p in folder.iterdir()] == ["apple.png"]


def test_the_same_seed_gives_the_same_file(run, folder):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("generate", "red apple", "--out", f"{name}.png", "--seed", seed, "--sampler", "ddpm")[0] == 0
    a, b, c = ((folder / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_names_of_several_pictures(run, folder):
    assert run("generate", "red apple", "green tree", "--num", 2)[0] == 0
    assert sorted(p.name for p in folder.iterdir()) == [f"red-apple-{i}.png" for i in (1, 2, 3, 4)]
    texts = [Image.open(f"red-apple-{i}.png").text for i in (1, 2, 3, 4)]
    assert [t["prompt"] for t in texts] == ["red apple"] * 2 + ["green tree"] * 2
    assert [t["seed"] for t in texts] == ["0", "1", "2", "3"]


def test_a_picture_can_be_made_again_from_its_text(run):
    run("generate", "red apple", "green tree", "--out", "two.png", "--sampler", "plms", "--steps", 3)
    text = Image.open("two-2.png").text
    again = [text["prompt"], "--out", "again.png"]
    for option in ("seed", "steps", "guidance", "sampler", "size"):
        again += [f"--{option}", text[option]]
    assert run("generate", *again)[0] == 0
    first, second = (pictures.read_image(name).int() for name in ("two-2.png", "again.png"))
    # Another batch size may round a latent to another code here and there.
    assert ((first - second).abs() > 2).float().mean() < 0.2


def test_grid(run, folder):
    code, out, _ = run("generate", "red apple", "--num", 3, "--grid", "--out", "grid.png")
    assert code == 0 and "3 images" in out
    assert [p.name for p in folder.iterdir()] == ["grid.png"]
    picture = Image.open("grid.png")
    assert picture.size == (32, 32) and json.loads(picture.text["prompt"]) == ["red apple"] * 3
    assert picture.getpixel((20, 20)) == (255, 255, 255)


def test_size_is_width_by_height(run):
    assert run("generate", "red apple", "--size", "24x8", "--out", "wide.png")[0] == 0
    assert Image.open("wide.png").size == (24, 8)


def test_empty_prompt_is_unconditional(run, folder):
    code, _, err = run("generate", "")
    assert (code, err) == (0, "")
    assert Image.open("unconditional.png").text["prompt"] == ""


def test_classes(run, class_model_path):
    """By number or name; "" is the class of no condition."""
    for name, prompt in (("number", 1), ("name", "dog"), ("other", 3)):
        code, _, err = run("generate", prompt, "--model", class_model_path, "--out", f"{name}.png")
        assert (code, err) == (0, "")
        assert Image.open(f"{name}.png").text["prompt"] == str(prompt)
    number, name, other = (pictures.read_image(f"{name}.png") for name in ("number", "name", "other"))
    assert torch.equal(number, name) and not torch.equal(number, other)
    for negative, same in (("", True), ("4", True), ("cat", False)):
        assert run("generate", 1, "--negative", negative, "--model", class_model_path, "--out", "n.png")[0] == 0
        assert torch.equal(pictures.read_image("n.png"), number) == same
    code, _, err = run("generate", "bird", "--model", class_model_path)
    assert code == 1
    assert err == "ldm-fast: this model draws classes, and 'bird' is none: give a number or one of cat, dog\n"
    code, _, err = run("generate", 5, "--model", class_model_path)
    assert (code, err) == (1, "ldm-fast: ClassEmbedder: label 5 is not in 0..4\n")


def test_an_unconditional_model(run, folder, unconditional_model_path):
    code, out, err = run("generate", "", "--num", 3, "--model", unconditional_model_path)
    assert (code, err) == (0, "") and "3 images" in out
    assert len(list(folder.iterdir())) == 3
    code, _, err = run("generate", "red apple", "--model", unconditional_model_path)
    assert (code, err) == (1, 'ldm-fast: this model is unconditional: give "" as PROMPT, and --num\n')


def test_device_dtype_eta_and_spacing(run, monkeypatch):
    seen, generate = [], LatentDiffusion.generate

    def watching(model, *arguments, **options):
        seen.append((model.unet.dtype, model.unet.device.type, options["eta"], options["spacing"]))
        return generate(model, *arguments, **options)

    monkeypatch.setattr(LatentDiffusion, "generate", watching)
    more = ("--device", "cpu", "--dtype", "bfloat16", "--eta", 0.5, "--spacing", "linspace")
    code, _, err = run("generate", "red apple", "--out", "x.png", *more)
    assert (code, err) == (0, "") and seen == [(torch.bfloat16, "cpu", 0.5, "linspace")]
    text = Image.open("x.png").text
    assert (text["dtype"], text["eta"], text["spacing"]) == ("bfloat16", "0.5", "linspace")


def test_the_model_goes_to_a_gpu_if_there_is_one(run, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(LatentDiffusion, "to", lambda model, device, dtype: devices.append(device) or model)
    photo("photo.png")
    assert run("generate", "red apple")[0] == run("reconstruct", "photo.png")[0] == 0
    assert run("generate", "red apple", "--device", "cpu")[0] == 0
    assert devices == ["cuda", "cuda", "cpu"]


def test_a_prompt_in_another_alphabet(run):
    code, _, err = run("generate", "яблоко 🍎", "--out", "x.png")
    assert code == 0 and err.startswith("ldm-fast: warning: the model does not know 'яблоко'")
    assert Image.open("x.png").text["prompt"] == "яблоко 🍎"


def test_long_prompt_is_cut_with_a_warning(run):
    code, _, err = run("generate", "apple " * 10_000, "--out", "x.png")
    assert code == 0
    assert err == ("ldm-fast: warning: the prompt has 10000 words; only the first 5 are used, 9995 are cut off\n")


def test_img2img_and_inpainting(run, folder):
    photo("init.png", (20, 16), "RGBA")
    Image.new("L", (20, 16), 0).save("mask.png")
    assert run("generate", "red apple", "--init", "init.png", "--strength", 0.5, "--out", "a.png")[0] == 0
    assert Image.open("a.png").text["strength"] == "0.5"
    assert run("generate", "red apple", "--init", "init.png", "--mask", "mask.png", "--out", "b.png")[0] == 0
    assert Image.open("b.png").text["mask"] == "mask.png"
    # Nothing is masked, so the picture is the reconstruction of the fitted init.
    Image.fromarray(pictures.read_image("init.png", (16, 16)).numpy()).save("fitted.png")
    assert run("reconstruct", "fitted.png", "--out", "c.png")[0] == 0
    assert torch.equal(pictures.read_image("b.png"), pictures.read_image("c.png"))


def test_reconstruct_keeps_any_size(run, folder):
    photo("cat.jpeg", (19, 13))
    code, out, _ = run("reconstruct", "cat.jpeg")
    assert code == 0 and "19x13" in out and "PSNR" in out
    assert Image.open("cat-reconstructed.png").size == (19, 13)
    assert run("reconstruct", "cat.jpeg", "--size", "8", "--out", "small.png")[0] == 0
    assert Image.open("small.png").size == (8, 8)


def truncated(model_path):
    content = model_path.read_bytes()
    return content[: len(content) // 2]


def tampered(model_path):
    content = bytearray(model_path.read_bytes())
    content[-9] ^= 255
    return bytes(content)


BAD_INPUT = {
    "no prompt": (["generate"], "required: PROMPT"),
    "steps 0": (["generate", "x", "--steps", 0], "steps must be between 1 and 1000, got 0"),
    "steps negative": (["generate", "x", "--steps", -5], "steps must be between 1 and 1000, got -5"),
    "steps a word": (["generate", "x", "--steps", "many"], "--steps: invalid int value: 'many'"),
    "sampler": (["generate", "x", "--sampler", "euler"], "unknown sampler 'euler'; known: ddim"),
    "guidance": (["generate", "x", "--guidance", "nan"], "guidance must be a finite number, got nan"),
    "eta": (["generate", "x", "--eta", 2], "eta must be between 0 and 1, got 2.0"),
    "spacing": (["generate", "x", "--spacing", "log"], "unknown timestep spacing 'log'"),
    "dtype": (["generate", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    "device": (["generate", "x", "--device", "toaster"], "--device toaster: "),
    "device that is not here": (["generate", "x", "--device", "cuda:77"], "--device cuda:77: "),
    "seed": (["generate", "x", "--seed", -1], "seed must be between 0 and"),
    "num": (["generate", "x", "--num", 0], "'0' is not a whole number of at least 1"),
    "size": (["generate", "x", "--size", 17], "size must be a multiple of 2, got 17; nearest are 16 and 18"),
    "size 0": (["generate", "x", "--size", 0], "sides must be between 1 and"),
    "size huge": (["generate", "x", "--size", "100000"], "sides must be between 1 and"),
    "size a word": (["generate", "x", "--size", "big"], "'big' is no size"),
    "init is text": (["generate", "x", "--init", "notes.txt"], "notes.txt is not an image that can be read"),
    "init is missing": (["generate", "x", "--init", "none.png"], "no such image file: none.png"),
    "init is a folder": (["generate", "x", "--init", "sub"], "sub"),
    "init is cut": (["generate", "x", "--init", "cut.png"], "cannot read the image cut.png"),
    "strength": (["generate", "x", "--init", "photo.png", "--strength", 1.5], "strength must be above 0"),
    "strength alone": (["generate", "x", "--strength", 0.5], "--strength needs --init IMAGE"),
    "mask alone": (["generate", "x", "--mask", "photo.png"], "--mask needs --init IMAGE"),
    "mask of another size": (
        ["generate", "x", "--init", "photo.png", "--mask", "small.png"],
        "--mask small.png is 8x8 pixels, --init photo.png 16x16",
    ),
    "out in no folder": (["generate", "x", "--out", "no/where.png"], "there is no folder no"),
    "out is a folder": (["generate", "x", "--out", "sub.png"], "cannot write sub.png: it is a folder"),
    "out is no png": (["generate", "x", "--out", "x.jpg"], "only PNG files can be written"),
    "model missing": (["generate", "x", "--model", "no.safetensors"], "no model file at no.safetensors"),
    "model is text": (["generate", "x", "--model", "notes.txt"], "notes.txt is not a whole safetensors file"),
    "model truncated": (["generate", "x", "--model", "cut.safetensors"], "cut.safetensors is not a whole"),
    "model tampered": (["generate", "x", "--model", "odd.safetensors"], "odd.safetensors has been changed"),
    "reconstruct text": (["reconstruct", "notes.txt"], "notes.txt is not an image"),
    "reconstruct to nowhere": (["reconstruct", "photo.png", "--out", "no/x.png"], "there is no folder no"),
    "recipe missing": (["train", "no_such_recipe"], "no_such_recipe"),
    "recipe typo": (["train", "typo.toml"], "nmae"),
    "train on a device that is not here": (["train", "tiny", "--device", "cuda:77"], "device cuda:77 cannot be used"),
    "command": (["paint"], "invalid choice: 'paint'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_that_names_it(run, folder, model_path, monkeypatch, arguments, message):
    (folder / "notes.txt").write_text("just some text\n" * 20)
    (folder / "sub").mkdir()
    (folder / "sub.png").mkdir()
    (folder / "typo.toml").write_text('nmae = "x"\n')
    photo("photo.png")
    photo("small.png", (8, 8))
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:150])
    (folder / "cut.safetensors").write_bytes(truncated(model_path))
    (folder / "odd.safetensors").write_bytes(tampered(model_path))
    before = sorted(folder.rglob("*"))
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if "warning: the model does not know" not in line]
    assert code not in (0, None) and out == ""
    assert len(lines) == 1 and lines[0].startswith("ldm-fast") and message in lines[0], err
    assert "bug" not in err
    assert sorted(folder.rglob("*")) == before  # nothing is left behind


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_out_in_a_folder_that_may_not_be_written(run, folder):
    (folder / "locked").mkdir(mode=0o500)
    code, _, err = run("generate", "red apple", "--out", "locked/x.png")
    assert code == 1 and err == "ldm-fast: cannot write locked/x.png: permission denied\n"


def test_a_full_disk_leaves_nothing_half_written(run, folder, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, err = run("generate", "red apple", "--out", "x.png")
    assert code == 1 and err == "ldm-fast: x.png: cannot write: No space left on device\n"
    assert list(folder.iterdir()) == []


def test_debug_shows_the_traceback(run):
    code, _, err = run("generate", "red apple", "--steps", 0, "--debug")
    assert code == 1 and "Traceback" in err and err.endswith("ldm-fast: steps must be between 1 and 1000, got 0\n")


def test_a_bug_is_called_one(run, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(LatentDiffusion, "generate", broken)
    code, _, err = run("generate", "red apple")
    assert code == 1
    assert err == "ldm-fast: this is a bug; --debug shows where: ZeroDivisionError: division by zero\n"


def test_interrupt(run, monkeypatch, folder):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LatentDiffusion, "generate", interrupted)
    code, _, err = run("generate", "red apple")
    assert (code, err) == (130, "ldm-fast: interrupted\n") and list(folder.iterdir()) == []


def test_evaluate_prints_a_table_and_a_json_line(run, monkeypatch):
    from ldm_fast.training import data

    monkeypatch.setattr(data, "load_data", lambda config: data.synthetic_images(config.size))
    code, out, _ = run("evaluate", "--seen", 3)
    assert code == 0
    metrics = json.loads(out.splitlines()[-1])
    assert metrics["seen_count"] == 3 and metrics["held_out_count"] == 1
    assert f"PSNR {metrics['psnr']:.2f} dB" in out


def test_evaluate_needs_a_model_of_words(run, class_model_path, monkeypatch):
    from ldm_fast.training import data

    monkeypatch.setattr(data, "load_data", lambda config: data.synthetic_images(config.size))
    code, out, err = run("evaluate", "--model", class_model_path)
    assert (code, out) == (1, "") and err.startswith("ldm-fast: evaluate: this model takes no words")


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("native CPU kernels", "CUDA kernels", "attention", "group_norm_silu", "nearest_codebook", "shipped"):
        assert word in out


@pytest.mark.parametrize("command", ["generate", "reconstruct", "evaluate", "train", "doctor", "bench"])
def test_help_teaches(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "usage: ldm-fast " + command in out
    assert command == "doctor" or f"  ldm-fast {command}" in out


def test_help_names_every_sampler(run):
    words = run("generate", "--help")[1].replace(",", " ").split()
    assert set(SAMPLERS) <= set(words)


def test_train_calls_the_training(run, monkeypatch):
    import ldm_fast.training

    calls = []

    def train(recipe, run_dir, **options):
        calls.append((recipe, str(run_dir), options))
        return run_dir / "model.safetensors"

    monkeypatch.setattr(ldm_fast.training, "train", train)
    assert run("train", "emoji")[0] == 0
    assert (
        run("train", "my/own.toml", "--run-dir", "here", "--stage", "first", "--restart", "--device", "cuda:1")[0] == 0
    )
    assert calls == [
        ("emoji", str(Path("runs", "emoji")), {"stage": "all", "resume": True, "first_stage": None, "device": None}),
        ("my/own.toml", "here", {"stage": "first", "resume": False, "first_stage": None, "device": "cuda:1"}),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_ends_as_shells_expect(run, monkeypatch, number):
    import ldm_fast.training

    def train(*_, **__):
        raise ldm_fast.training.TrainingStopped("first_stage stopped after step 3 of 9", number)

    monkeypatch.setattr(ldm_fast.training, "train", train)
    code, _, err = run("train", "emoji")
    assert code == 128 + number and err == "ldm-fast: first_stage stopped after step 3 of 9\n"


def test_module_can_be_run(folder):
    done = subprocess.run(
        [sys.executable, "-m", "ldm_fast.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"ldm-fast {ldm_fast.__version__}\n"


def test_bench_without_a_checkout(run, folder, monkeypatch):
    monkeypatch.setattr(commands, "__file__", str(folder / "site-packages" / "ldm_fast" / "cli" / "commands.py"))
    code, _, err = run("bench")
    assert code == 1 and err.startswith("ldm-fast: no benchmarks in ") and err.count("\n") == 1


def test_bench_runs_and_passes_on_failure(run, folder, monkeypatch):
    monkeypatch.setattr(commands, "__file__", str(folder / "ldm_fast" / "cli" / "commands.py"))
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "good.py").write_text("open('good.ran', 'w')")
    (folder / "benchmarks" / "bad.py").write_text("raise SystemExit(3)")
    (folder / "benchmarks" / "_shared.py").write_text("raise SystemExit(4)")
    assert run("bench", "good")[0] == 0 and (folder / "good.ran").exists()
    assert run("bench")[0] == 3
    assert "no benchmark called '_shared'; there are bad, good" in run("bench", "_shared")[2]


# Names of files and prompts


@pytest.fixture
def cafe(folder):
    """A name in Latin-1."""
    name = os.fsdecode(b"caf\xe9")
    try:
        photo(folder / f"{name}.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes only names in UTF-8")
    return name


def test_names_that_are_not_utf8(run, folder, cafe, model_path):
    """As a picture to start from, as a mask, as a model, as a place for the result, as a prompt."""
    picture, out = f"{cafe}.png", f"{cafe} out.png"
    (folder / f"{cafe}.safetensors").symlink_to(model_path)
    model = ("--model", f"{cafe}.safetensors")
    assert run("generate", "red apple", "--init", picture, "--mask", picture, "--out", out, *model)[0] == 0
    text = Image.open(folder / out).text
    assert text["init"] == "caf\\xe9.png" and text["mask"] == "caf\\xe9.png"
    for arguments in (("--out", "a.png"), (), ("--num", 2, "--grid", "--out", "b.png")):
        code, _, err = run("generate", f"red {cafe}", *arguments, "--negative", cafe)
        assert code == 0 and "does not know 'caf', '\\xe9'" in err
    assert Image.open(folder / "a.png").text["prompt"] == "red caf\\xe9" and (folder / "red-caf.png").is_file()
    code, out, err = run("reconstruct", picture)
    assert (code, err) == (0, "") and out.startswith("caf\\xe9-reconstructed.png: 16x16")
    (folder / picture).write_bytes(b"no picture")
    assert run("reconstruct", picture) == (1, "", "ldm-fast: caf\\xe9.png is not an image that can be read\n")


def test_default_names_fit(run, folder):
    letter = "\U0001d518"
    assert run("generate", letter * 60, "--num", 2)[0] == 0
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 2 and all(240 <= len(name.encode()) <= 255 and letter in name for name in names)
    photo(folder / ("a" * 251 + ".png"))
    assert run("reconstruct", "a" * 251 + ".png")[0] == 0
    assert (folder / ("a" * 237 + "-reconstructed.png")).is_file()
    assert run("generate", "red", "--out", "b" * 251 + ".png")[0] == 0
    code, _, err = run("generate", "red", "--out", "b" * 252 + ".png")
    assert code == 1 and err == f"ldm-fast: {'b' * 252}.png: File name too long\n"
