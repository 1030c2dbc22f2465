"""The stages of a build: stage.py says what one is, build_plan.py lists those of a recipe, options.py says
what each sees of it; the other modules hold their functions."""
