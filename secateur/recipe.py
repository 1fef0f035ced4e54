"""`python -m secateur.recipe`: see secateur/pipeline/recipe.py."""

from secateur.pipeline.recipe import main

if __name__ == "__main__":
    main()
