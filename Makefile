.PHONY: train test lint ext aot bench gpu

train:  ## learn the bundled example
	dti-fast train

test:  ## everything that needs no GPU
	pytest

lint:  ## style and types
	ruff check . && ruff format --check . && mypy

ext:  ## build csrc/ for this torch
	python -m dti_fast.ops._build

aot:  ## compile every Triton kernel for five GPU generations, without a GPU
	pytest tests/test_aot.py

bench:  ## the ops here, a training step beside what others do, what it keeps in memory, where its time goes
	python -m benchmarks.gpu_suite --smoke --stages environment,ops --out bench-output
	python -m benchmarks.bench_train --json bench-output/train.json
	python -m benchmarks.bench_memory
	python -m benchmarks.profile_step

gpu:  ## the proof on a card, in three calls of less than nine minutes
	python -m benchmarks.gpu_suite --out gpu-output/1 --stages environment,tests,ceilings,ops
	python -m benchmarks.gpu_suite --out gpu-output/2 --stages train,graph,pocket
	python -m benchmarks.gpu_suite --out gpu-output/3 --stages memory,cards,job
