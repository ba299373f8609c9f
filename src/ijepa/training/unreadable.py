"""When too many images are unreadable for a run to go on, decided on the counts of all ranks.

The share of unreadable images among those seen so far is above any limit now and then by chance, the more so as it is
looked at after every step. So a run stops for one of two reasons:

* It is certain: more images have been unreadable than the limit allows in as many passes over the data set as have
  begun, even if every image that is still to come is readable.
* The images seen are a random sample, and their counts exclude a share within the limit. The evidence is the likelihood
  ratio of the counts between a mixture of all shares (Jeffreys' prior) and the limit. By Ville's inequality it ever
  exceeds 1 / `RISK` with a probability of at most `RISK`, over any number of looks, if the share is within the limit.
"""

from math import ceil, lgamma, log, log1p, pi

RISK = 1e-6
"""Probability at most that a run ever stops on a sample although the share is within the limit."""


def too_many(bad: int, seen: int, images: int, limit: float, *, shuffled: bool) -> bool:
    """Whether the share of unreadable images is above `limit`.

    Args:
        bad: how many of the images seen were unreadable.
        seen: images seen since the run began, over all ranks.
        images: size of the data set; each pass sees every image once.
        limit: the largest share that is allowed, in [0, 1]. Unless it is 0, one unreadable image is within it, however
            small the data set.
        shuffled: whether each pass is a random permutation of all images, so that those seen are a random sample.
    """
    if limit > 0:
        limit = max(limit, 1 / images)
    allowed = limit * images * ceil(seen / images)
    if bad > allowed * (1 + 1e-12):  # rounded, the limit itself must not count as above it
        return True
    if not shuffled or not 0 < limit < 1 or bad <= limit * seen:
        return False
    good = seen - bad
    mixture = lgamma(bad + 0.5) + lgamma(good + 0.5) - lgamma(seen + 1) - log(pi)
    return mixture - bad * log(limit) - good * log1p(-limit) > -log(RISK)
