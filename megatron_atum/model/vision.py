"""CLIP vision transformer (OpenCLIP ViT-H/14 at full size), HF modeling: idefics/vision.py.

The tower is not split over tensor ranks. Each tensor rank encodes its share of a microbatch's images and the
features are gathered (`encode_shared`): splitting 0.6B weights would cost collectives in each of 32 layers, and
replicating the work could double steps with many images.

Legend: n images of this rank, N images of the microbatch, P patch tokens incl. class token, V embedding width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_atum.batch import images_per_tensor_rank
from megatron_atum.config.schema import ModelConfig
from megatron_atum.errors import DataError
from megatron_atum.model.configs import vision_config
from megatron_atum.model.language import layer_submodules
from megatron_atum.model.layer_classes import TORCH
from megatron_atum.model.norm import LayerNorm
from megatron_atum.model.recompute import checkpointed
from megatron_atum.parallel.gradients import mark_replicated
from megatron_atum.parallel.groups import ProcessGroups


class VisionTransformer(MegatronModule):
    """Images to the last layer's states of all tokens, without the final norm (HF: IdeficsVisionTransformer).

    `post_layernorm` belongs to the checkpoint only: nothing uses its output, so it never trains.
    """

    def __init__(
        self, model: ModelConfig, groups: ProcessGroups, dtype: torch.dtype, *, recompute: bool = False
    ) -> None:
        """recompute: keep the input of each layer only, where the tower trains."""
        config = vision_config(model, dtype)
        super().__init__(config=config)
        self.recompute = recompute
        v = model.vision
        self.settings = v
        self.groups = groups
        self.grid = v.image_size // v.patch_size
        self.patch_embedding = nn.Conv2d(
            v.num_channels, v.embed_dim, v.patch_size, v.patch_size, bias=False, dtype=dtype
        )
        self.class_embedding = nn.Parameter(torch.empty(v.embed_dim, dtype=dtype))
        self.position_embedding = nn.Parameter(torch.empty(self.grid**2 + 1, v.embed_dim, dtype=dtype))
        self.pre_layernorm = LayerNorm(config, v.embed_dim, v.norm_eps)
        submodules = layer_submodules(replace(TORCH, norm=LayerNorm), AttnMaskType.no_mask, groups.alone.tp)
        self.layers = nn.ModuleList(
            TransformerLayer(config, submodules, layer_number=n + 1, pg_collection=groups.alone)
            for n in range(v.num_layers)
        )
        self.post_layernorm = LayerNorm(config, v.embed_dim, v.norm_eps)
        for parameter in self.parameters():
            # Each rank's gradient is that of its own images.
            mark_replicated(parameter, sum_gradient=True)
            parameter.tensor_model_parallel = False

    def forward(self, pixels_nCHW: Tensor) -> Tensor:
        """[n,3,H,W] -> [n,P,V]. n may be 0."""
        patches_nVHW = self.patch_embedding(pixels_nCHW)
        n, V, rows, columns = patches_nVHW.shape
        class_n1V = self.class_embedding.expand(n, 1, V)
        hidden_nPV = torch.cat((class_n1V, patches_nVHW.flatten(2).transpose(1, 2)), dim=1)
        hidden_nPV = self.pre_layernorm(hidden_nPV + self._positions(rows, columns, pixels_nCHW.shape[-2:]))
        hidden_PnV = hidden_nPV.transpose(0, 1).contiguous()
        for layer in self.layers:
            run = partial(checkpointed, layer) if self.recompute else layer
            hidden_PnV, _ = run(hidden_PnV, None)
        return hidden_PnV.transpose(0, 1)

    def _positions(self, rows: int, columns: int, size: torch.Size) -> Tensor:
        """Position table [P,V], interpolated for other image sizes.

        The 0.1 in the scale is part of the formula: bicubic sampling uses it (HF idefics/vision.py:
        interpolate_pos_encoding).
        """
        image = self.settings.image_size
        if self.settings.interpolate_positions:
            if rows * columns == self.grid**2 and size[0] == size[1]:
                return self.position_embedding
            return self._interpolated_positions(rows, columns)
        if tuple(size) != (image, image):
            raise DataError(
                f"an image of {size[0]}x{size[1]} pixels reached a vision tower of model.vision.image_size={image}; "
                "resize it, or set model.vision.interpolate_positions=true"
            )
        return self.position_embedding

    def _interpolated_positions(self, rows: int, columns: int) -> Tensor:
        class_1V, table_GV = self.position_embedding[:1], self.position_embedding[1:]
        table_1VGG = table_GV.reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        table_1VRC = F.interpolate(
            table_1VGG.float(),
            scale_factor=((rows + 0.1) / self.grid, (columns + 0.1) / self.grid),
            mode="bicubic",
            align_corners=False,
        ).to(table_1VGG.dtype)
        return torch.cat((class_1V, table_1VRC.permute(0, 2, 3, 1).flatten(0, 2)), dim=0)

    def encode_shared(self, pixels_nCHW: Tensor, num_images: int) -> Tensor:
        """Encode this rank's images and gather those of all tensor ranks.

        Args:
            pixels_nCHW: images `batch.image_slice(num_images, tensor_rank, tensor_size)` of the microbatch.

        Returns:
            [N,P,V] on every tensor rank.
        """
        trains = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            features_nPV = self(pixels_nCHW)
            share = images_per_tensor_rank(num_images, self.groups.layout.tensor)
            padded = F.pad(features_nPV, (0, 0, 0, 0, 0, share - features_nPV.shape[0])).contiguous()
            # The perceiver's gradient is whole on every rank, so backward only takes out this rank's images.
            gathered = gather_from_sequence_parallel_region(
                padded, tensor_parallel_output_grad=False, group=self.groups.tensor
            )
        return gathered[:num_images]
