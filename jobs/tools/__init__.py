"""Tools around training and serving: conversion, evaluation, generation, operation, faults, certificates."""

from __future__ import annotations
