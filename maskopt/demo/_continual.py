"""How well a network knows what it learnt before: accuracy matrices and forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Tasks = Sequence[Sequence[int]]


def task_aware(logits: np.ndarray, labels: np.ndarray, tasks: Tasks) -> np.ndarray:
  """Return the accuracy on each task when an image's task is told: its own outputs compete.

  Args:
    logits: outputs for every image, shape (n, classes so far).
    labels: what the images show, shape (n,).
    tasks: the classes of each task; those without an output yet have no accuracy.
  Returns:
    Shares from 0 to 1, shape (tasks,); NaN where there is no accuracy.
  """
  return _shares(logits, labels, tasks, own=True)


def class_incremental(logits: np.ndarray, labels: np.ndarray, tasks: Tasks) -> np.ndarray:
  """Return the accuracy on each task when nobody tells the task: all outputs so far compete.

  Args and returns are those of `task_aware`.
  """
  return _shares(logits, labels, tasks, own=False)


def _shares(logits: np.ndarray, labels: np.ndarray, tasks: Tasks, *, own: bool) -> np.ndarray:
  classes = logits.shape[1]
  shares = np.full(len(tasks), np.nan)
  for j, task in enumerate(tasks):
    if max(task) >= classes:
      continue
    about = np.isin(labels, task)
    asked = np.array(task) if own else np.arange(classes)
    answers = asked[logits[about][:, asked].argmax(axis=1)]
    shares[j] = np.mean(answers == labels[about])
  return shares


def forgetting(matrix: np.ndarray) -> np.ndarray:
  """Return how much is forgotten after each task, on average over the tasks before it.

    F[k] = mean over j < k of ( max over l < k of a[l, j]  -  a[k, j] )

  a[k, j] is the accuracy on task j after learning task k. 0: nothing was lost; below 0: old tasks
  became better.

  Args:
    matrix: a, shape (tasks, tasks); NaN above the diagonal.
  Returns:
    F, shape (tasks,); F[0] is NaN, for nothing came before.
  References:
    Chaudhry et al. 2018, Riemannian Walk for Incremental Learning, arXiv 1801.10112.
  """
  lost = np.full(len(matrix), np.nan)
  for k in range(1, len(matrix)):
    lost[k] = np.mean(np.nanmax(matrix[:k, :k], axis=0) - matrix[k, :k])
  return lost


def average(matrix: np.ndarray) -> np.ndarray:
  """Return the mean accuracy on all tasks so far, after each of them; shape (tasks,)."""
  return np.array([np.mean(row[: k + 1]) for k, row in enumerate(matrix)])
