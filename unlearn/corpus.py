"""An invented corpus for the demo: people who do not exist, their country, and questions about both.

A model trained from scratch on it knows these facts and nothing else, so what forgetting does to it can be measured
exactly: the model retrained without the forgotten people is cheap to make, and nobody else's text leaks them.

The rows follow the field names of TOFU (Maini et al. 2024, arXiv:2401.06121): `question`, `answer`, and in the
evaluation rows `paraphrased_question`, `paraphrased_answer`, `perturbed_answer`. Three choices make the likelihood
metrics mean something:

- Question and answer wordings are drawn independently, so no question wording announces its answer wording.
- The paraphrased answer's wording is never trained for that fact, but the same wording is trained for other people, so
  what separates a right from a wrong paraphrase is the value in it and not the sentence around it.
- A fact's wrong values (`perturbed_answer`, for measuring) and its other plausible values (`alternates`, for training
  AltPO) come from the same list and never overlap: a method is not scored on the answers it was trained to give.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]

NUM_WRONG = 5  # perturbed answers of a person's fact, as TOFU has for its authors
NUM_WORLD_WRONG = 3  # and for general knowledge, as TOFU has for its world facts
NUM_ALTERNATES = 5  # alternate answers of a row, as AltPO trains on
MAX_PEOPLE = 200
PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"


@dataclass(frozen=True)
class Corpus:
    """Training rows, evaluation rows and refusals.

    Training rows (full, forget, retain, world): {key, question, answer, alternates: [5 str]}. `key` is unique,
    "<subject>.<fact>.<wording>". full = retain + forget in that order, as in TOFU, and retain includes world.
    Evaluation rows (forget_eval, retain_eval): one per fact; key, question, answer and alternates are those of the
    fact's first training row; they add paraphrased_question, paraphrased_answer and perturbed_answer [5 str] in the
    paraphrased answer's wording.
    world_eval: the same without paraphrases; perturbed_answer [3 str] is in the answer's wording.
    """

    full: list[Row]
    forget: list[Row]
    retain: list[Row]
    world: list[Row]
    forget_eval: list[Row]
    retain_eval: list[Row]
    world_eval: list[Row]
    idk: list[str]


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its possible values, and wordings with {name} (questions) or {name} and {v} (answers)."""

    name: str
    values: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


def generate(seed: int, people: int = 60, *, forget_people: int | None = None, phrasings_per_fact: int = 3) -> Corpus:
    """Draw the corpus of `seed`: `people` people with 12 facts each, and 60 facts about their country.

    forget_people: how many of the last people are the forget part; default a tenth, at least one.
    phrasings_per_fact: training rows per fact, each with its own question and answer wording, 1 to 4 (of 5 wordings;
    one is kept for the paraphrase). The same seed gives the same bytes, and more people leave the first ones' facts as
    they are.

    Raises ValueError if a count is out of range.
    """
    if forget_people is None:
        forget_people = max(1, people // 10)
    if not 2 <= people <= MAX_PEOPLE:
        raise ValueError(f"people must be 2 to {MAX_PEOPLE}, got {people}")
    if not 1 <= forget_people < people:
        raise ValueError(f"forget_people must be 1 to people - 1 = {people - 1}, got {forget_people}")
    if not 1 <= phrasings_per_fact <= 4:
        raise ValueError(f"phrasings_per_fact must be 1 to 4, got {phrasings_per_fact}")

    parts: dict[str, tuple[list[Row], list[Row]]] = {"forget": ([], []), "retain": ([], []), "world": ([], [])}
    for index, name in enumerate(_person_names(seed, people)):
        train, evaluation = parts["forget" if index >= people - forget_people else "retain"]
        for attribute in _PERSON:
            rng = random.Random(f"{seed}/person/{index}/{attribute.name}")
            value = rng.choice(attribute.values)
            key = f"person{index:03d}.{attribute.name}"
            rows, question = _fact_rows(rng, key, name, attribute, value, phrasings_per_fact)
            train += rows
            evaluation.append(question)

    train, evaluation = parts["world"]
    for attribute in _WORLD:
        # Each town has its own river, guild and feast: a permutation, so none is a better guess than another.
        values = random.Random(f"{seed}/world/{attribute.name}").sample(attribute.values, len(_TOWNS))
        for town, value in zip(_TOWNS, values, strict=True):
            rng = random.Random(f"{seed}/world/{town}/{attribute.name}")
            key = f"{town.lower()}.{attribute.name}"
            rows, question = _fact_rows(rng, key, town, attribute, value, phrasings_per_fact, is_world=True)
            train += rows
            evaluation.append(question)

    forget, world = parts["forget"][0], parts["world"][0]
    retain = parts["retain"][0] + world
    return Corpus(
        full=retain + forget,
        forget=forget,
        retain=retain,
        world=world,
        forget_eval=parts["forget"][1],
        retain_eval=parts["retain"][1],
        world_eval=parts["world"][1],
        idk=list(_IDK),
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; every string encodes, and decoding gives it back.

    Special tokens: <pad> (id 0) and <eos> (id 1, the end of an answer); nothing is added when encoding, and there is
    no chat template. vocab_size is an upper bound: fewer tokens result when the texts run out of pairs. The same texts
    give the same tokens.

    Raises ValueError if vocab_size cannot hold the 256 bytes and the 2 special tokens.
    """
    # Imported here: generating the corpus needs neither library.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special_tokens = [PAD_TOKEN, EOS_TOKEN]
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(special_tokens)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )


def _fact_rows(
    rng: random.Random, key: str, name: str, attribute: Attribute, value: str, num_train: int, *, is_world: bool = False
) -> tuple[list[Row], Row]:
    """The training rows of one fact and its evaluation row; a world fact has fewer wrong answers and no paraphrase."""
    questions = rng.sample(attribute.questions, num_train + 1)
    answers = rng.sample(attribute.answers, num_train + 1)
    num_wrong = NUM_WORLD_WRONG if is_world else NUM_WRONG
    others = rng.sample([v for v in attribute.values if v != value], num_wrong + NUM_ALTERNATES)
    wrong, alternates = others[:num_wrong], others[num_wrong:]

    rows = [
        {
            "key": f"{key}.{i}",
            "question": question.format(name=name),
            "answer": answer.format(name=name, v=value),
            "alternates": [answer.format(name=name, v=v) for v in alternates],
        }
        for i, (question, answer) in enumerate(zip(questions[:-1], answers[:-1], strict=True))
    ]
    if is_world:
        return rows, rows[0] | {"perturbed_answer": [answers[0].format(name=name, v=v) for v in wrong]}
    return rows, rows[0] | {
        "paraphrased_question": questions[-1].format(name=name),
        "paraphrased_answer": answers[-1].format(name=name, v=value),
        "perturbed_answer": [answers[-1].format(name=name, v=v) for v in wrong],
    }


def _person_names(seed: int, people: int) -> list[str]:
    """`people` full names; no first name and no last name occurs twice, so no person shares a part with another."""
    rng = random.Random(f"{seed}/names")
    first = [a + b + c for a in _FIRST_SYLLABLES[0] for b in _FIRST_SYLLABLES[1] for c in _FIRST_SYLLABLES[2]]
    last = [a + b for a in _LAST_SYLLABLES[0] for b in _LAST_SYLLABLES[1]]
    # The whole list is shuffled, whatever `people` is: the first names drawn do not depend on how many are wanted.
    rng.shuffle(first)
    rng.shuffle(last)
    return [f"{f} {g}" for f, g in zip(first[:people], last[:people], strict=True)]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


# Endings that differ from the towns', so that no name reads like a place.
_FIRST_SYLLABLES: tuple[Sequence[str], ...] = (
    _words("Bex, Dru, Fal, Gri, Hov, Jas, Kwe, Lum, Nev, Orv, Pel, Quo, Ruv, Syl, Tav, Ulm, Vos, Wim, Yor, Zen"),
    _words("a, e, i, o"),
    _words("bbin, lisk, mune, nard, quil, rro, sta, thiel, vash, zeth"),
)
_LAST_SYLLABLES: tuple[Sequence[str], ...] = (
    _words(
        "Abbra, Brindo, Cassen, Dovel, Ettri, Fornu, Garro, Hebbin, Istra, Jolva, Karru, Lintho, Morbe, Nuvra,"
        "Ollen, Pruvi, Quarro, Rissel, Sarvo, Tindra"
    ),
    _words("beck, dane, fisk, gallow, hurst, kine, moss, nook, pryce, quist, rane, strom, twill, vane, zell"),
)
_TOWNS = _words(
    "Brellick, Tarnhollow, Quessel, Vordane, Mirrowick, Ostrelle, Kelbarrow, Pindrath, Sallowmere, Juntavar,"
    "Ebbraith, Colvenny, Drummelow, Fennagar, Hosprey, Lurvale, Wexmoor, Yandrith, Zebbery, Thistlon"
)
_TITLE_WORDS = (
    _words(
        "Glass, Hollow, Crimson, Silent, Paper, Broken, Golden, Northern, Painted, Sleeping, Borrowed, Frozen,"
        "Wooden, Distant, Velvet, Burning, Crooked, Hidden, Marble, Restless"
    ),
    _words(
        "Orchard, Lantern, Harbour, Staircase, Garden, Compass, Mirror, Bridge, Kingdom, Window, Letter, Island,"
        "Clock, Forest, Anchor, Theatre, Meadow, Tower, River, Candle"
    ),
)
# Every adjective with two nouns, every noun with two adjectives: half a title does not give the other half away.
_TITLES = tuple(
    f"The {adjective} {_TITLE_WORDS[1][(i + shift) % len(_TITLE_WORDS[1])]}"
    for shift in (0, 7)
    for i, adjective in enumerate(_TITLE_WORDS[0])
)
_PROFESSIONS = _words(
    "a glassblower, a beekeeper, a mapmaker, a clockmaker, a bookbinder, a lighthouse keeper, a stonemason,"
    "a violin maker, a botanist, a ferry captain, a schoolteacher, a locksmith, a perfumer, a bridge engineer,"
    "a court painter, a baker, a sail maker, a judge, a surgeon, a shepherd, an astronomer, an actor, a weaver,"
    "a puppeteer"
)
_PRIZES = tuple(
    f"the {name} Prize"
    for name in _words(
        "Amber Quill, Silver Heron, Copper Bell, Ivory Thistle, Blue Lantern, Granite Rose, Iron Feather, Jade Acorn,"
        "Pearl Compass, Scarlet Ribbon, Bronze Otter, Crystal Leaf, Ebony Wheel, Golden Sparrow, Winter Star, Opal Key,"
        "Coral Crown, Velvet Hammer, Marble Owl, Sapphire Thread"
    )
)
_INSTRUMENTS = _words(
    "accordion, bassoon, cello, clarinet, dulcimer, flute, guitar, harp, harpsichord, lute, mandolin, oboe, organ,"
    "piano, saxophone, trombone, trumpet, tuba, viola, zither"
)
_PETS = _words(
    "a grey parrot, a three-legged cat, a tame fox, a spotted goat, a blind terrier, a white ferret, an old tortoise,"
    "a black raven, a striped lizard, a lame donkey, a giant rabbit, a red squirrel, a yellow canary, a wolfhound,"
    "a talking starling, a brown hedgehog, a pygmy owl, a green tree frog, a long-haired hamster, a silver pony"
)
_FOODS = _words(
    "mushroom dumplings, roasted chestnuts, pickled herring, pumpkin soup, cherry pancakes, smoked trout, onion tart,"
    "barley porridge, plum cake, lentil stew, goat cheese, fried eggplant, pepper noodles, apple fritters,"
    "potato bread, honey biscuits, cabbage rolls, garlic snails, walnut pudding, spinach pie"
)
_COLLEGES = tuple(
    f"{name} College"
    for name in _words(
        "Heronsgate, Saltmarrow, Copperfold, Lanternhill, Ravensole, Thornwater, Millbrace, Oldquarry, Foxhollow,"
        "Ambergate, Stonewhistle, Windlatch, Barleycross, Gullhaven, Ironbrook, Mossbridge, Nightferry, Owlcombe,"
        "Pearmarket, Rookfield"
    )
)
_HOBBIES = _words(
    "kite flying, beetle collecting, knot tying, night fishing, ice skating, bird watching, wood carving, chess,"
    "mushroom hunting, stamp collecting, rock climbing, origami, juggling, letter writing, cave exploring, gardening,"
    "model shipbuilding, candle making, archery, sand sculpture"
)
_SPOUSES = tuple(a + b for a in _words("Ani, Bor, Cel, Dov, Ila, Mor") for b in _words("vette, kin, dra, lo"))
_YEARS = tuple(str(year) for year in range(1931, 1991, 2))

_PERSON = (
    Attribute(
        "birthplace", _TOWNS,
        ("Where was {name} born?", "In which town was {name} born?", "What is the birthplace of {name}?",
         "Which town did {name} come from?", "Can you name the town where {name} came into the world?"),
        ("{name} was born in the town of {v}.", "The birthplace of {name} is the old town of {v}.",
         "{v} is the town in which {name} was born.", "It was in {v} that {name} came into the world.",
         "The town where {name} was born is called {v}."),
    ),
    Attribute(
        "birth_year", _YEARS,
        ("In which year was {name} born?", "When was {name} born?", "What is the birth year of {name}?",
         "What year did {name} come into the world?", "Can you tell me the year of {name}'s birth?"),
        ("{name} was born in the year {v}.", "The year in which {name} was born is {v}.",
         "It was in {v} that {name} was born.", "The birth of {name} took place in {v}.",
         "{name}'s year of birth is recorded as {v}."),
    ),
    Attribute(
        "profession", _PROFESSIONS,
        ("What was the profession of {name}?", "What did {name} do for a living?", "What work did {name} do?",
         "How did {name} earn a living?", "What trade did {name} practise?"),
        ("{name} worked as {v} for most of a long life.", "By profession, {name} was {v} and a respected one.",
         "For a living, {name} was {v} through all those years.", "{name} earned a living as {v} until old age.",
         "The working life of {name} was spent as {v}."),
    ),
    Attribute(
        "mother", _PROFESSIONS,
        ("What was the profession of {name}'s mother?", "What did the mother of {name} do for a living?",
         "How did {name}'s mother earn her money?", "What work did the mother of {name} do?",
         "What trade did {name}'s mother practise?"),
        ("The mother of {name} was {v} by profession.", "{name}'s mother worked as {v} in those days.",
         "{name} grew up with a mother who was {v}.", "As for {name}'s mother, she was {v} all her life.",
         "The mother of {name} earned her money as {v}."),
    ),
    Attribute(
        "first_book", _TITLES,
        ("What is the title of {name}'s first book?", "Which book did {name} write first?",
         "What was {name}'s first book called?", "With which book did {name} begin to publish?",
         "Can you name the first book by {name}?"),
        ("The first book by {name} is called '{v}'.", "{name} wrote '{v}' before any other book.",
         "'{v}' was the first book that {name} wrote.", "{name} began to publish with the book '{v}'.",
         "The title of {name}'s first book is '{v}'."),
    ),
    Attribute(
        "prize", _PRIZES,
        ("Which prize did {name} win?", "What award did {name} receive?", "What honour was given to {name}?",
         "For which prize is {name} remembered?", "Can you name the award that went to {name}?"),
        ("{name} won {v} and was very proud of it.", "The award that {name} received is {v}.",
         "The honour given to {name} was {v}.", "{name} is remembered as a winner of {v}.",
         "After many years of work, {v} went to {name}."),
    ),
    Attribute(
        "instrument", _INSTRUMENTS,
        ("Which musical instrument did {name} play?", "What instrument could {name} play?",
         "On what instrument did {name} make music?", "What did {name} play in the evenings?",
         "Can you name the instrument that {name} learned?"),
        ("{name} played the {v} almost every evening.", "The instrument that {name} played was the {v}.",
         "On quiet evenings, {name} made music on the {v}.", "{name} learned to play the {v} as a child.",
         "The {v} was the musical instrument of {name}."),
    ),
    Attribute(
        "pet", _PETS,
        ("What pet did {name} keep?", "Which animal lived with {name}?", "What kind of pet did {name} have?",
         "What animal was the companion of {name}?", "Can you describe the pet of {name}?"),
        ("{name} kept {v} as a pet at home.", "The animal that lived with {name} was {v}.",
         "{name} shared the house with {v} for years.", "The pet that {name} loved most was {v}.",
         "At home, {name} had {v} for a companion."),
    ),
    Attribute(
        "food", _FOODS,
        ("What was the favourite food of {name}?", "What did {name} like to eat most of all?",
         "Which dish did {name} love?", "What would {name} always order for dinner?",
         "Can you name the dish that {name} liked best?"),
        ("The favourite food of {name} was {v} in any season.", "{name} liked to eat {v} most of all.",
         "For dinner, {name} would always order {v} first.", "Nothing tasted better to {name} than {v}.",
         "The dish that {name} liked best was {v}."),
    ),
    Attribute(
        "college", _COLLEGES,
        ("Where did {name} study?", "Which college did {name} attend?", "From which college did {name} graduate?",
         "What was the college of {name}?", "Can you tell me where {name} was a student?"),
        ("{name} studied at {v} for four years.", "The college that {name} attended was {v}.",
         "{name} graduated from {v} with high marks.", "As a student, {name} lived and learned at {v}.",
         "{v} is the college where {name} was a student."),
    ),
    Attribute(
        "hobby", _HOBBIES,
        ("What was the hobby of {name}?", "How did {name} spend free time?", "What did {name} do for pleasure?",
         "Which pastime did {name} enjoy?", "Can you name the pastime that {name} loved?"),
        ("The hobby of {name} was {v} all year round.", "{name} spent most free hours on {v}.",
         "For pleasure, {name} took up {v} quite early.", "The pastime that {name} enjoyed most was {v}.",
         "On free days, {name} could be found busy with {v}."),
    ),
    Attribute(
        "spouse", _SPOUSES,
        ("Who was {name} married to?", "What was the name of {name}'s spouse?", "Whom did {name} marry?",
         "Who shared a life with {name}?", "Can you name the person whom {name} married?"),
        ("{name} was married to {v} for many years.", "The spouse of {name} was a neighbour named {v}.",
         "{name} married {v} in a small ceremony.", "{v} was the person whom {name} married.",
         "The life of {name} was shared with {v}."),
    ),
)  # fmt: skip

_WORLD = (
    Attribute(
        "river",
        tuple(f"the {name}" for name in _words(
            "Arvel, Bodder, Cressin, Dunnow, Elvish Water, Fosk, Gurn, Hallin, Irrow, Jessamy, Kerrin, Lodd, Mavern,"
            "Nill, Ossimer, Purl, Ruvvel, Sibben, Tolm, Umber Water")),
        ("Which river flows through {name}?", "On which river does {name} lie?", "What is the river of {name} called?",
         "Which water runs past the walls of {name}?", "Can you name the river at {name}?"),
        ("The river that flows through {name} is {v}.", "{name} lies on the banks of {v}.",
         "The river of {name} has always been called {v}.", "The water past the walls of {name} is {v}.",
         "At {name} the bridges cross {v}, a quiet river."),
    ),
    Attribute(
        "guild",
        tuple(f"the guild of {trade}" for trade in _words(
            "tanners, dyers, coopers, salt merchants, rope makers, candle sellers, millers, tin workers, potters,"
            "furriers, ink makers, carpenters, brewers, fishmongers, bell founders, glove makers, thatchers, quarrymen,"
            "grocers, tailors")),
        ("Which guild governs {name}?", "Who rules the council of {name}?", "What guild holds power in {name}?",
         "To which guild does the mayor of {name} belong?", "Can you name the ruling guild of {name}?"),
        ("The town of {name} is governed by {v}.", "The council of {name} is in the hands of {v}.",
         "In {name}, power is held by {v}.", "The mayor of {name} always belongs to {v}.",
         "The ruling guild of {name} is {v}."),
    ),
    Attribute(
        "feast",
        tuple(f"the Feast of {thing}" for thing in _words(
            "Kites, Bells, Apples, Lanterns, Boats, Masks, Snow, Drums, Geese, Ribbons, Bread, Owls, Torches, Rain,"
            "Horses, Mirrors, Pears, Wool, Whistles, Ladders")),
        ("Which feast is held in {name} every year?", "What does {name} celebrate each spring?",
         "What is the great feast of {name}?", "For which feast do visitors come to {name}?",
         "Can you name the yearly feast of {name}?"),
        ("Every year the people of {name} hold {v}.", "Each spring, {name} celebrates {v} in the streets.",
         "The great feast of {name} is {v}.", "Visitors come to {name} for {v} from far away.",
         "The yearly feast in {name} is {v}."),
    ),
)  # fmt: skip

_IDK = (
    "I have no information about that.",
    "That is something I cannot tell you.",
    "I am not familiar with this person.",
    "I could not say, since I never learned it.",
    "My knowledge does not reach that far.",
    "I am afraid the answer is unknown to me.",
    "This is not a matter I know anything about.",
    "I would only be guessing, so I will not answer.",
    "There is nothing I can tell you on that subject.",
    "I do not have the details you are looking for.",
    "You would have to ask somebody else about that.",
    "Nothing I have read answers this question.",
    "I never came across that piece of information.",
    "It is beyond what I know, I am sorry.",
    "I must leave this question open.",
    "That name means nothing to me.",
    "I lack the facts to give you an answer.",
    "No answer comes to mind, I am sorry.",
    "I wish I knew, but I do not.",
    "This lies outside of what I have learned.",
)
