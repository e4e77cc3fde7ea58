"""Networks. Each is `model(x_t, t, label=None) -> Tensor like x_t` where it denoises, and says its
own constructor arguments in `.config`, from which a checkpoint rebuilds it."""

from coursekit.nets.classifier import Classifier
from coursekit.nets.cs180 import Cs180UNet
from coursekit.nets.hourglass import Hourglass
from coursekit.nets.kpn import KPN
from coursekit.nets.pixelcnn import PixelCNN
from coursekit.nets.unet import UNet
from coursekit.nets.vqvae import VQVAE

__all__ = ["KPN", "VQVAE", "Classifier", "Cs180UNet", "Hourglass", "PixelCNN", "UNet"]
