import pickle

from ijepa.utils.errors import RunError, UserError, did_you_mean


def test_user_error_is_one_line_of_its_three_parts():
    error = UserError("data.path", "no images\nin 2 folders", "give a folder\twith images")
    assert str(error) == "data.path: no images in 2 folders; give a folder with images"
    assert str(UserError("seed", "missing")) == "seed: missing"


def test_user_error_keeps_its_parts_when_it_is_pickled():
    error = UserError("data.path", "no images", "give a folder")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.where, copy.problem, copy.hint) == ("data.path", "no images", "give a folder")
    assert str(copy) == str(error)


def test_exit_codes():
    assert RunError("the disk is full").exit_code == 1
    assert UserError("seed", "missing").exit_code == 2
    assert isinstance(UserError("seed", "missing"), RunError)


def test_did_you_mean_names_the_closest_word_or_all_words():
    assert did_you_mean("lr_encodr", ["seed", "lr_encoder"]) == "did you mean lr_encoder?"
    assert did_you_mean("xyz", ["seed", "epochs"]) == "known: seed, epochs"
