# Two commands do everything: `make demo` and `make test`. Needed before: Python 3.11 or newer and a network for pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test bench clean

# A CT of the chest and one of the head and neck from the model that the package carries. Twice gives the same bytes.
demo: $(VENV)/.installed
	rm -rf out/demo-chest out/demo-head-neck
	mkdir -p out
	$(BIN)/maisi generate --region chest --fov auto --seed 0 -o out/demo-chest
	$(BIN)/maisi generate --region head-neck --fov auto --seed 0 -o out/demo-head-neck
	@echo "Look at out/demo-chest/0000/preview.png and out/demo-head-neck/0000/preview.png"

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

# Beside the reference on this machine, a few minutes; more sizes, budgets and rounds: python benchmarks/NAME.py --help
bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/decode.py --size 64 -o out/bench/decode-64.json
	$(BIN)/python benchmarks/encode.py --size 64 -o out/bench/encode-64.json
	$(BIN)/python benchmarks/denoise.py --network unet --latent 32 -o out/bench/denoise-unet-32.json
	$(BIN)/python benchmarks/denoise.py --network controlnet --latent 32 -o out/bench/denoise-controlnet-32.json
	$(BIN)/python benchmarks/end_to_end.py --size 64 --steps 4 -o out/bench/end-to-end-64.json
	$(BIN)/python benchmarks/splitting.py --task decode --size 64,48,48 --parts 1,2,4,8 -o out/bench/splitting-decode

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The stamps are newer than what was installed from, so a second `make` installs nothing.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@
