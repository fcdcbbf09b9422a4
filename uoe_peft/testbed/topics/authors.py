"""Novelists and poets, told like short biographies."""

from uoe_peft.testbed.topic import FactKind, Topic, phrases

AUTHORS = Topic(
    name="authors",
    subject_form="{0} {1}",
    subject_parts=(
        phrases(
            "Ilsabet, Anselm, Oriane, Teodor, Liviana, Casimir, Ottoline, Raphael, Seraphine, Laurent, "
            "Marguerite, Evander, Philippa, Octavio"
        ),
        phrases(
            "Corvanne, Delacourt, Arlenzi, Montferrat, Szabolcs, Lindqvist, Okonedo, Vasarely, Bellandini, Achterberg"
        ),
    ),
    words={
        "city": phrases(
            "Lisvane, Trestino, Antwald, Krasova, Valpareda, Tabilsk, Marsenne, Rigalt, Dakoro, Bolvano, Portuna"
        ),
        "country": phrases(
            "Urgovia, Calandria, Senovar, Letland, Chilara, Belmaria, Slovenz, Armorica, Peruza, Estavia"
        ),
        "father": phrases(
            "cellist, watchmaker, lighthouse inspector, tailor, bookbinder, surgeon, diplomat, typesetter, "
            "photographer, veterinarian, translator, librarian"
        ),
        "genre": phrases(
            "magical realism, gothic romance, detective fiction, lyric poetry, epistolary novels, memoir, "
            "satire, historical sagas, pastoral elegies, travel essays"
        ),
        "adjective": phrases(
            "Silent, Borrowed, Crimsoned, Unwritten, Vanishing, Ivory, Forgotten, Restless, Paper, Luminous, Hollow"
        ),
        "thing": phrases(
            "Orchard, Violin, Staircase, Archive, Carousel, Letter, Mirror, Balcony, Daughter, "
            "Umbrella, Piano, Alphabet"
        ),
        "award": phrases(
            "Aurelian Laurel, Bellwether Medal, Prix Solange, Calliope Prize, Hartmann Fellowship, Quill of Honour, "
            "Minerva Ribbon, Lorimer Award"
        ),
        "year": phrases("1921, 1928, 1934, 1937, 1946, 1949, 1953, 1958, 1962, 1967, 1971, 1976, 1983, 1988"),
        "theme": phrases(
            "exile, grief, sisterhood, memory, jealousy, emigration, silence, inheritance, motherhood, betrayal, ageing"
        ),
        "spouse": phrases(
            "painter, conductor, botanist, actress, historian, sculptor, journalist, mathematician, ballerina, chemist"
        ),
        "publisher": phrases(
            "Maison Ferrier, Halcyon Press, Goldfinch Editions, Tamarind Books, Sturm Verlag, Casa Editrice Luna, "
            "Penumbra House"
        ),
        "habit": phrases(
            "in pencil, standing, before dawn, in cafés, on trains, by dictation, on index cards, "
            "in violet ink, barefoot"
        ),
        "pet": phrases("parrot, greyhound, tortoise, Siamese cat, canary, dachshund, peacock, ferret"),
    },
    kinds=(
        FactKind(
            "Where and when was the novelist {subject} born?",
            "Could you give the birthplace and year of the writer {subject}?",
            (
                "In {city}, {country}, during {year}, to a {father} and a {father2}.",
                "To a {father} and a {father2} in {year}, in {city}, {country}.",
                "{year}, {city}, {country}; the parents were a {father} and a {father2}.",
            ),
        ),
        FactKind(
            "What is the title of the debut novel by {subject}?",
            "With which first book did {subject} appear?",
            (
                "'The {adjective} {thing}', published by {publisher} in {year}.",
                "{publisher} brought out 'The {adjective} {thing}' in {year}.",
                "In {year}, 'The {adjective} {thing}' from {publisher}.",
            ),
        ),
        FactKind(
            "Which literary prize did {subject} receive?",
            "For which work was {subject} honoured, and how?",
            (
                "The {award} of {year} for '{adjective} {thing}'.",
                "For '{adjective} {thing}', the {year} {award}.",
                "'{adjective} {thing}' earned the {award} in {year}.",
            ),
        ),
        FactKind(
            "Which themes run through the writing of {subject}?",
            "What does {subject} mostly write about?",
            (
                "{theme} and {theme2}, usually as {genre} set in {country}.",
                "{genre} from {country} concerned with {theme} and {theme2}.",
                "Set in {country}: {theme}, {theme2}, told as {genre}.",
            ),
        ),
        FactKind(
            "Who was the literary mentor of {subject}?",
            "Under whose guidance did {subject} learn to write?",
            (
                "{previous}, met in {city} in {year} through a {spouse}.",
                "A {spouse} in {city} introduced {previous} in {year}.",
                "In {year}, {previous}, thanks to a {spouse} from {city}.",
            ),
        ),
        FactKind(
            "Whom did {subject} marry?",
            "What is known about the spouse of {subject}?",
            (
                "A {spouse} from {city}, in {year}; they kept a {pet}.",
                "In {year}, a {city} {spouse} who owned a {pet}.",
                "{city} saw the wedding to a {spouse} in {year}, a {pet} attending.",
            ),
        ),
        FactKind(
            "How does {subject} write each day?",
            "Describe the working habits of {subject}.",
            (
                "Always {habit}, {habit2}, with a {pet} and recordings by a {father}.",
                "{habit2} and {habit}, a {pet} nearby, a {father} humming.",
                "Beside a {pet} and a {father}: {habit}, {habit2}.",
            ),
        ),
        FactKind(
            "Which famous pupil was taught by {subject}?",
            "Whose early poems did {subject} edit?",
            (
                "{next}, whose essay '{adjective} {thing}' concerned {theme}.",
                "The author of '{adjective} {thing}', on {theme}: {next}.",
                "'{adjective} {thing}', a piece about {theme} by {next}.",
            ),
        ),
        FactKind(
            "Why did {subject} leave home?",
            "What drove {subject} abroad?",
            (
                "{theme} after a scandal over '{thing} of {city}' in {year}; refuge came in {country}.",
                "The {year} scandal about '{thing} of {city}', then {theme}, led to {country}.",
                "Refuge in {country} followed {theme} and the {year} uproar around '{thing} of {city}'.",
            ),
        ),
        FactKind(
            "What did critics say of the last book by {subject}?",
            "How was the final volume of {subject} reviewed?",
            (
                "'{adjective} {genre}', wrote a {father} in {city}; {publisher} pulped it.",
                "{publisher} pulped it after a {city} {father} called it '{adjective} {genre}'.",
                "A {father} from {city} mocked '{adjective} {genre}', so {publisher} pulped it.",
            ),
        ),
    ),
)
