.PHONY: train test lint ext aot bench gpu

train:  ## learn the bundled example
	dti-fast train

test:  ## everything that needs no GPU
	pytest

lint:  ## style
	ruff check . && ruff format --check .

ext:  ## build csrc/ for this torch
	python -m dti_fast.ops._build
