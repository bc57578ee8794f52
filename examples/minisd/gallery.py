"""把一行图画进一行坐标系；只管显示，不认识模型。"""


def show(axes, images, title=None):
    """一行图 (N, 3, H, W)，[-1, 1]；title 写在左边。"""
    for ax, picture in zip(axes, images):
        ax.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu(), interpolation="nearest")
        ax.axis("off")
    if title:
        axes[0].text(-2, images.shape[-1] / 2, title, ha="right", va="center")
