"""`python -m secateur.sync`: see secateur/pipeline/sync.py."""

from secateur.pipeline.sync import main

if __name__ == "__main__":
    main()
