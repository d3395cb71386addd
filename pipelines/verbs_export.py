"""The verb that writes an encoder as other programs load it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.errors import UserError
from pipelines.verbs import Model

if TYPE_CHECKING:
    from pipelines.use.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write an encoder as transformers and sentence-transformers load it, or as an ONNX graph."""

    model: Model
    out: Path
    """Folder to write; there must be none yet."""
    format: Literal["hf", "onnx"] = "hf"
    """hf is for BERTs; onnx is for every encoder, and is compared with it on real texts or pictures
    before the folder appears."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""

    def run(self) -> dict[str, Any]:
        """Write the folder and say how to load it."""
        from pipelines.use.registry import open_model

        if self.out.exists():
            raise UserError(f"{self.out} exists: name a folder that does not, or remove it")
        _, sha256, encoder = open_model(self.model, self.tracking_uri)
        told = self._onnx(encoder, sha256) if self.format == "onnx" else self._hf(encoder)
        return {"out": str(self.out), "format": self.format, **told}

    def _hf(self, encoder: "Encoder") -> dict[str, Any]:
        from pipelines.use.hf_export import export

        export(encoder, self.out)
        parameters = sum(tensor.numel() for tensor in encoder.state.values())
        print(
            f"{parameters:,} parameters in {self.out}: load them with "
            f'transformers.BertForPreTraining.from_pretrained("{self.out}")'
        )
        return {"parameters": parameters}

    def _onnx(self, encoder: "Encoder", sha256: str) -> dict[str, Any]:
        from pipelines.use.onnx_export import GRAPH_NAME, export

        found = export(encoder, sha256, self.out)
        print(
            f"{encoder.dimension} numbers an embedding, at most {found.max_error:.1e} from those "
            f"of the encoder, of which the largest is {found.largest:.2g}: load it with "
            f'onnxruntime.InferenceSession("{self.out / GRAPH_NAME}")'
        )
        return {"dimension": encoder.dimension, **found._asdict()}
