"""The published methods, one file each, in folders by family; importing this package registers all of them."""

from passes.linearize.agent import Agent
from passes.linearize.agent_sd import AgentSd
from passes.linearize.enhanced_linear import EnhancedLinear
from passes.linearize.hedgehog import Hedgehog
from passes.linearize.inline_attention import InlineAttention
from passes.linearize.lightning import Lightning
from passes.linearize.rala import Rala
from passes.prune.cls_ensemble import ClsEnsemble
from passes.prune.cls_prune import ClsPrune
from passes.prune.diverse import Diverse
from passes.prune.dominant_contextual import DominantContextual
from passes.prune.evit import EViT
from passes.prune.fastv import FastV
from passes.prune.fuse import Fuse
from passes.prune.hired import HiRed
from passes.prune.matryoshka import Matryoshka
from passes.prune.merge import ToMe
from passes.prune.outlier_tokens import OutlierTokens
from passes.prune.pyramid import PyramidDrop
from passes.prune.token_exit import TokenExit
from passes.redistribute.calibrate import Calibrate
from passes.redistribute.head_reinforce import HeadReinforce
from passes.redistribute.relu_attention import ReluAttention
from passes.redistribute.sigmoid import SigmoidAttention
from passes.redistribute.sink_redistribution import SinkRedistribution
from passes.redistribute.temperature import Temperature
from passes.sparsify.composite import Composite
from passes.sparsify.grid import Grid
from passes.sparsify.halo import Halo
from passes.sparsify.modality_mutual import ModalityMutual
from passes.sparsify.neighborhood import Neighborhood
from passes.sparsify.routed import Routed
from passes.sparsify.sparsifiner import Sparsifiner
from passes.sparsify.window import Window

__all__ = [
    "Agent",
    "AgentSd",
    "Calibrate",
    "ClsEnsemble",
    "ClsPrune",
    "Composite",
    "Diverse",
    "DominantContextual",
    "EViT",
    "EnhancedLinear",
    "FastV",
    "Fuse",
    "Grid",
    "Halo",
    "HeadReinforce",
    "Hedgehog",
    "HiRed",
    "InlineAttention",
    "Lightning",
    "Matryoshka",
    "ModalityMutual",
    "Neighborhood",
    "OutlierTokens",
    "PyramidDrop",
    "ReluAttention",
    "Rala",
    "Routed",
    "SigmoidAttention",
    "SinkRedistribution",
    "Sparsifiner",
    "Temperature",
    "ToMe",
    "TokenExit",
    "Window",
]
