"""How a card says that its weights are loaded, library by library; a test runs every line of it in a release."""

from ijepa.config.recipe import ModelSection
from ijepa.model.ijepa import IMAGENET_MEAN, IMAGENET_STD


def loading_section(model: ModelSection) -> str:
    """Return the card's section; its paths are those of a reader in the release's folder."""
    height, width = model.image_size
    heads = model.encoder.heads
    return f"""## How to load it

In this folder, with `ijepa` installed. It normalises bytes itself; every other library wants pixels that are normalised
by ImageNet's mean and deviation, as here:

```python
import ijepa, torch

encoder = ijepa.load_encoder(".")  # which="context" for the other encoder
pixels = torch.randint(0, 256, (2, 3, {height}, {width}), dtype=torch.uint8)  # RGB
patches = encoder(pixels)  # (2, {model.grid[0] * model.grid[1]}, {model.encoder.width})
mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ({IMAGENET_MEAN}, {IMAGENET_STD}))
normalised = (pixels / 255 - mean) / deviation
```

Others read what these write (`--which context` for the other encoder):

```sh
ijepa export . ../hf --format transformers
ijepa export . ../timm --format timm
ijepa export . ../encoder.safetensors --format safetensors
ijepa export . ../encoder.onnx --format onnx
ijepa export . ../encoder.pt2 --format program
ijepa export . ../jepa.pth.tar --format official
```

transformers:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("../hf", add_pooling_layer=False).eval()
hidden = model(normalised).last_hidden_state
```

timm:

```python
import timm

model = timm.create_model("local-dir:../timm", pretrained=True).eval()
features = model.forward_features(normalised)
```

safetensors, under the names of timm and of the original; {heads} attention heads:

```python
from safetensors.torch import load_file

state = load_file("../encoder.safetensors")
```

ONNX:

```python
import onnxruntime

session = onnxruntime.InferenceSession("../encoder.onnx")
(output,) = session.run(["last_hidden_state"], {{"pixel_values": normalised.numpy()}})
```

torch.export, with torch alone:

```python
program = torch.export.load("../encoder.pt2").module()
result = program(normalised)
```

Code written for the original, whose encoder takes normalised pixels too:

```python
content = torch.load("../jepa.pth.tar", weights_only=True)
original = {{name.removeprefix("module."): value for name, value in content["target_encoder"].items()}}
```"""
