"""TorchScript compiles a layer's Python source, which it cannot for this package's."""


class Unscriptable:
    """Mixed into the layers: torch.jit.script refuses them alike, before it has read any source."""

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"cnn_ext.{type(self).__name__} is not for torch.jit.script: use torch.compile, torch.export or "
            "torch.onnx.export, or script what cnn_ext.revert(model) gives"
        )
