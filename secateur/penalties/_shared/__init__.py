"""Code that several penalties share; none of these modules is a penalty."""
