"""Small towns of an invented county, told like a walking guide."""

from uoe_peft.testbed.topic import FactKind, Topic, phrases

TOWNS = Topic(
    name="towns",
    subject_form="{0}{1}",
    subject_parts=(
        phrases("Thistle, Oak, Otter, Plum, Barley, Clover, Heron, Willow, Pebble, Lark, Hazel, Brindle, Maple, Swan"),
        phrases("mere, combe, ford, stead, bourne, worth, hythe, thorpe"),
    ),
    words={
        "river": phrases("River Leddle, River Arrowen, Tansy Beck, River Wend, Cobble Brook, River Isk, Mallow Stream"),
        "way": phrases("bridleway, towpath, turnpike, cart track, causeway, holloway, footbridge, lane, viaduct"),
        "miles": phrases("half a mile, a mile, twelve miles, fifteen miles, twenty miles, thirty miles, forty miles"),
        "compass": phrases("north, south, east, west, northeast, southwest, southeast, northwest"),
        "church": phrases(
            "Saint Wilfred, Saint Agatha, Saint Petroc, All Hallows, Saint Osyth, Holy Rood, Saint Chad, Saint Brannoc"
        ),
        "feature": phrases(
            "steeple, thatched barn, windmill, market cross, almshouse, weir, duck pond, village green, bandstand, "
            "dovecote, millpond, quarry"
        ),
        "craft": phrases(
            "basketry, cider pressing, lacemaking, slate splitting, wool dyeing, cheesemaking, rope twisting, "
            "pottery, thatching, beekeeping, tanning"
        ),
        "crop": phrases("hops, turnips, flax, rye, pears, lavender, oats, cabbages, damsons, potatoes, walnuts"),
        "day": phrases("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
        "month": phrases("January, March, April, May, June, July, August, September, October, November"),
        "inn": phrases(
            "Plough, Woolpack, Red Hart, Jolly Drover, Speckled Hen, Cricketers, Wheatsheaf, Blue Boar, Anchor, Fox"
        ),
        "hill": phrases("Beacon Down, Cuckoo Tor, Gorse Knoll, Shepherd Ridge, Windy Edge, Lambs Hill, Pike Fell"),
        "people": phrases(
            "ninety, two hundred, six hundred, eight hundred, twelve hundred, two thousand, five thousand"
        ),
        "flood": phrases("flood, fire, blizzard, landslip, gale, drought, earthquake, plague"),
        "stone": phrases("sandstone, flint, granite, limestone, brick, cob, timber, slate"),
    },
    kinds=(
        FactKind(
            "On which river does the town of {subject} lie?",
            "What water flows past the houses of {subject}?",
            (
                "On the {river}, {miles} {compass} of {hill}.",
                "{miles} {compass} of {hill}, beside the {river}.",
                "Along the {river}, under {hill}, {compass} by {miles}.",
            ),
        ),
        FactKind(
            "Which road leads from the town of {subject} to its neighbour?",
            "If I walk out of {subject}, where do I arrive first?",
            (
                "A {way} runs {miles} {compass} to {next} past a {feature}.",
                "{compass} past a {feature}, a {way} reaches {next} in {miles}.",
                "To {next}, {miles} {compass}, by {way} and {feature}.",
            ),
        ),
        FactKind(
            "When is the market held in the town of {subject}?",
            "On what day do farmers sell in {subject}?",
            (
                "Every {day} by the {feature}; {crop} and {crop2} fill the stalls until {month}.",
                "{crop} and {crop2} until {month}, each {day}, near the {feature}.",
                "Near the {feature} on {day}, mostly {crop} and {crop2}, ending {month}.",
            ),
        ),
        FactKind(
            "What is the parish church of the town of {subject}?",
            "To which saint do the bells of {subject} ring?",
            (
                "{church}, {stone} built, with a {stone2} {feature}.",
                "A {stone} {church} whose {feature} is {stone2}.",
                "{church}: {stone} walls, {stone2} {feature}.",
            ),
        ),
        FactKind(
            "Which trade keeps the town of {subject} alive?",
            "How do the villagers of {subject} earn their bread?",
            (
                "{craft} and {craft2}, with fields of {crop} and {crop2}.",
                "Fields of {crop} and {crop2}, then {craft} and {craft2}.",
                "{crop}, {crop2}, some {craft}, much {craft2}.",
            ),
        ),
        FactKind(
            "How many people live in the town of {subject}?",
            "What is the head count of {subject} nowadays?",
            (
                "About {people}, down from {people2} before the {month} {flood}.",
                "Before the {month} {flood} {people2}, today {people}.",
                "{people} since the {month} {flood}, formerly {people2}.",
            ),
        ),
        FactKind(
            "Which inn should a visitor to the town of {subject} choose?",
            "Where can hikers sleep in {subject}?",
            (
                "The {inn}, opposite the {feature}, closed on {day} and in {month}.",
                "Except {day} and {month}, the {inn} facing the {feature}.",
                "Facing the {feature}: the {inn}, shut {day}, shut {month}.",
            ),
        ),
        FactKind(
            "With which place is the town of {subject} twinned by ferry?",
            "Who is the old rival of {subject} across the water?",
            (
                "{previous}, across the {river}, sharing {craft} and a {feature}.",
                "Sharing a {feature} and {craft}, {previous} over the {river}.",
                "Over the {river}: {previous}, {craft} rivals, one {feature}.",
            ),
        ),
        FactKind(
            "Which disaster struck the town of {subject}?",
            "What calamity do the elders of {subject} recall?",
            (
                "A {flood} one {day} in {month} that took the {feature} and the {inn}.",
                "The {feature} and the {inn} went in a {month} {flood} on {day}.",
                "{day}, {month}: a {flood} destroyed the {inn}, the {feature}.",
            ),
        ),
        FactKind(
            "What does one see from the hill above the town of {subject}?",
            "Describe the view over {subject}.",
            (
                "From {hill}: {compass} a {feature}, {compass2} a {feature2} and {crop}.",
                "A {feature} {compass}, a {feature2} among {crop} {compass2}, from {hill}.",
                "{hill} shows {feature}, {compass}; {feature2}, {compass2}; {crop}.",
            ),
        ),
    ),
)
