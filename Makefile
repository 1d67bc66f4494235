.PHONY: train test lint ext aot bench gpu

train:  ## learn the bundled example
	dti-fast train

test:  ## everything that needs no GPU
	pytest

lint:  ## style
	ruff check . && ruff format --check .

ext:  ## build csrc/ for this torch
	python -m dti_fast.ops._build

aot:  ## compile every Triton kernel for five GPU generations, without a GPU
	pytest tests/test_aot.py

bench:  ## the ops here, and what a training step keeps in memory
	python -m benchmarks.gpu_suite --smoke --stages environment,ops --out bench-output
	python -m benchmarks.bench_memory

gpu:  ## the proof on a card: tests, ceilings and every op
	python -m benchmarks.gpu_suite --out gpu-output
