"""多版本：只有 mike 部署时才有版本选择器，平时的站点不去请求 versions.json。"""

import os


def on_config(config):
    if os.environ.get("MIKE_DOCS_VERSION"):  # mike 构建时设的
        config.extra["version"] = {"provider": "mike", "default": "latest"}
    return config
