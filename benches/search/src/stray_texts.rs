//! The parts of texts on subjects that a catalogue of products does not have.

/// Sentences of a subject, and things that each sentence can be about. Each has a paraphrase beside it.
pub struct Subject {
    /// Sentences, with `{}` in the place of a thing.
    pub sentences: [(&'static str, &'static str); 2],
    /// Things.
    pub things: [(&'static str, &'static str); 5],
}

/// All subjects.
pub static SUBJECTS: [Subject; 20] = [
    Subject {
        sentences: [
            (
                "Astronomers suspect that a cloud of dust made {} fade last winter",
                "{} lost brightness in the cold season, possibly dimmed by dust, observers of the sky believe",
            ),
            (
                "The parallax of {} puts it further from the Earth than the old star charts say",
                "By its tiny yearly shift, {} lies at a greater distance from us than was believed",
            ),
        ],
        things: [
            ("Betelgeuse", "Betelgeuse, the red giant in Orion"),
            ("Sirius", "Sirius, the Dog Star"),
            ("the Crab pulsar", "the pulsar within the Crab Nebula"),
            ("Proxima Centauri", "Proxima, the sun nearest to ours"),
            ("the Andromeda galaxy", "Andromeda, the neighbour of the Milky Way"),
        ],
    },
    Subject {
        sentences: [
            (
                "The court of appeal ruled that {} was void, since the judge had misdirected the jury",
                "Because jurors got wrong instructions, {} was set aside on appeal",
            ),
            (
                "Counsel for the plaintiff argued that {} came after the limitation period had run out",
                "The claimant's barrister said that the legal deadline had passed before {}",
            ),
        ],
        things: [
            ("the conviction for perjury", "the perjury verdict"),
            ("the eviction of the tenant", "the removal of the leaseholder"),
            ("the contested will", "the testament that the heirs disputed"),
            ("the libel award", "the damages for defamation"),
            ("the bankruptcy petition", "the filing for bankruptcy"),
        ],
    },
    Subject {
        sentences: [
            (
                "Surgeons treated {} through an incision no longer than a fingernail",
                "With a very small cut, the operating team repaired {}",
            ),
            (
                "A trial of two thousand volunteers found that the vaccine does not prevent {}",
                "The vaccine gave no protection against {}, a large clinical study concluded",
            ),
        ],
        things: [
            ("a ruptured appendix", "a burst appendix"),
            ("a torn retina", "a rip at the back of the eye"),
            ("gallstones", "gallstones in the bladder"),
            ("an aneurysm of the aorta", "a bulge in the body's main artery"),
            ("a slipped disc", "a herniated disc of the spine"),
        ],
    },
    Subject {
        sentences: [
            (
                "The skipper of {} reefed the mainsail before the squall reached the headland",
                "Ahead of the sudden gale off the cape, the captain of {} shortened canvas",
            ),
            (
                "At slack tide {} ran aground on the sandbank south of the lighthouse",
                "While the water stood still, {} got stuck in the shallows near the beacon",
            ),
        ],
        things: [
            ("the schooner", "the two-masted schooner"),
            ("the old ketch", "the ketch, a veteran vessel"),
            ("the racing catamaran", "the catamaran, a fast boat with two hulls"),
            ("the herring trawler", "the ship that fishes for herring"),
            ("the Baltic ferry", "the ferry on the Baltic route"),
        ],
    },
    Subject {
        sentences: [
            (
                "Beneath the monastery, archaeologists uncovered {} from the reign of Hadrian",
                "Diggers below the abbey found {}, which date back to Roman times",
            ),
            (
                "The museum returned {} to Greece after forty years of negotiations",
                "Athens got {} back from the gallery when decades of talks had ended",
            ),
        ],
        things: [
            ("mosaics of dolphins", "floor pictures of dolphins in coloured stone"),
            ("bronze spearheads", "points of lances made of bronze"),
            ("burial urns", "urns that hold the ashes of the dead"),
            ("clay tablets with writing", "inscribed tablets of clay"),
            ("marble heads of goddesses", "female deities' heads carved in marble"),
        ],
    },
    Subject {
        sentences: [
            (
                "The theologian held that {} was a metaphor and never a historical event",
                "For this scholar of religion, {} is an image and did not literally happen",
            ),
            (
                "In the fresco above the altar, {} is painted in ochre and lapis lazuli",
                "Above the altar, a wall painting in blue and earthen pigments depicts {}",
            ),
        ],
        things: [
            ("the flood of Noah", "the deluge that Noah survived"),
            ("the parting of the Red Sea", "how the Red Sea opened for Moses"),
            ("the Last Supper", "the final meal of Jesus and the apostles"),
            ("the fall of Jericho", "Jericho's walls tumbling down"),
            ("the tower of Babel", "Babel and its tower"),
        ],
    },
    Subject {
        sentences: [
            (
                "The proof that {} took the mathematician seven years and three hundred pages",
                "After years of labour and a very long manuscript, it has been demonstrated that {}",
            ),
            (
                "A counterexample shattered the conjecture that {}",
                "A single case that breaks the rule refutes the guess that {}",
            ),
        ],
        things: [
            ("four colours suffice for every map", "any map can be coloured with four colours"),
            ("there are infinitely many twin primes", "prime pairs that differ by two never end"),
            ("every even number is a sum of two primes", "two primes add up to any even integer"),
            ("parallel lines meet at infinity", "parallels intersect infinitely far away"),
            ("all knots can be untied in four dimensions", "a fourth dimension loosens any knot"),
        ],
    },
    Subject {
        sentences: [
            (
                "Biologists counted {} in the delta and found fewer than ever before",
                "The census of {} at the river's mouth gave the lowest number on record",
            ),
            (
                "A fungus brought by ships is killing {} along the whole coast",
                "Near the sea, {} die of a mould that arrived with foreign vessels",
            ),
        ],
        things: [
            ("flamingos", "pink wading flamingos"),
            ("sea turtles", "turtles of the ocean"),
            ("horseshoe crabs", "horseshoe crabs, those living fossils"),
            ("mangrove trees", "the mangroves with their stilt roots"),
            ("river dolphins", "the freshwater dolphins"),
        ],
    },
    Subject {
        sentences: [
            (
                "The central bank raised interest rates because {} threatened the currency",
                "Borrowing was made dearer by monetary policy, since {} endangered the exchange rate",
            ),
            (
                "Economists blame {} on the speculation that preceded the crash",
                "Reckless bets before the market collapsed are said to have caused {}",
            ),
        ],
        things: [
            ("hyperinflation", "runaway inflation of prices"),
            ("mass unemployment", "widespread unemployment"),
            ("the national debt", "what the state owes its creditors"),
            ("the flight of capital", "capital leaving the country"),
            ("the trade deficit", "importing far more than is exported"),
        ],
    },
    Subject {
        sentences: [
            (
                "Geologists explain {} by the collision of two continental plates",
                "When landmasses pushed into each other, {} came about, say earth scientists",
            ),
            (
                "Nobody in the valley had expected {} to happen again within a century",
                "A repetition of {} in less than a hundred years surprised the villagers",
            ),
        ],
        things: [
            ("the folding of the Alps", "the Alps being creased upward"),
            ("the eruption of the volcano", "the volcano spewing lava"),
            ("the great earthquake", "the strong tremor of the ground"),
            ("the landslide above the lake", "the slope that slid toward the lake"),
            ("the birth of hot springs", "hot water beginning to well up from the rock"),
        ],
    },
    Subject {
        sentences: [
            (
                "In the second act {} confesses everything to the dying king",
                "Midway through the play, {} reveals the whole truth before the monarch passes away",
            ),
            (
                "Critics hated the novel because {} turns out to have dreamt the entire plot",
                "Reviewers disliked the book, in whose ending {} wakes up and nothing was real",
            ),
        ],
        things: [
            ("the jealous sister", "the envious sister"),
            ("the court jester", "the jester of the palace"),
            ("the one-eyed general", "the commander with a single eye"),
            ("the orphan from Seville", "the parentless child of Seville"),
            ("the disgraced priest", "the clergyman who lost his honour"),
        ],
    },
    Subject {
        sentences: [
            (
                "The ministers signed a treaty on {} after a night of shouting in Geneva",
                "Following noisy talks until dawn, governments concluded an international accord about {}",
            ),
            (
                "The opposition called for a referendum on {} and lost it narrowly",
                "A popular vote about {}, demanded by the rival party, failed by a few ballots",
            ),
        ],
        things: [
            ("fishing quotas", "how much fish each state may catch"),
            ("nuclear disarmament", "getting rid of atomic warheads"),
            ("the border in the Arctic", "where the frontier in the polar sea runs"),
            ("the extradition of spies", "handing over captured secret agents"),
            ("asylum for refugees", "shelter for people who flee from war"),
        ],
    },
    Subject {
        sentences: [
            (
                "Fold the egg whites gently into {}, or the souffle will collapse in the oven",
                "So that the baked dish rises, stir beaten whites into {} with great care",
            ),
            (
                "My grandmother simmered {} with bay leaves and saffron every Sunday",
                "On Sundays, {} bubbled slowly with laurel and saffron at granny's house",
            ),
        ],
        things: [
            ("the bechamel", "the white sauce of butter, flour and milk"),
            ("the chestnut puree", "the mashed chestnuts"),
            ("the lobster bisque", "the creamy lobster soup"),
            ("the grated Gruyere", "the Gruyere cheese in shreds"),
            ("the spinach", "spinach greens"),
        ],
    },
    Subject {
        sentences: [
            (
                "The goalkeeper was sent off for {} two minutes before the final whistle",
                "With the match nearly over, the keeper saw a red card because of {}",
            ),
            (
                "The champion denied {} and blamed a contaminated blood sample",
                "The title holder said that the test was tainted and that {} never took place",
            ),
        ],
        things: [
            ("doping", "taking forbidden substances"),
            ("spitting at the referee", "having spat on the referee"),
            ("handling the ball outside the area", "touching the ball by hand beyond the box"),
            ("biting a defender", "sinking teeth into a defender"),
            ("betting on the result", "wagering money on how the game would end"),
        ],
    },
    Subject {
        sentences: [
            (
                "Linguists trace {} back to the nomads who crossed the steppe on horseback",
                "Mounted wanderers of the grasslands are the source of {}, language researchers say",
            ),
            (
                "The last speaker who knew {} died in a village in the Caucasus",
                "With the death of an old mountain dweller, {} vanished for ever",
            ),
        ],
        things: [
            ("the dual number of nouns", "nouns having a special form for two"),
            ("the whistled dialect", "the way of speaking by whistles"),
            ("the click consonants", "the consonants that are clicked"),
            ("the runic alphabet", "the alphabet of runes"),
            ("the tonal vowels", "vowels whose pitch changes the meaning"),
        ],
    },
    Subject {
        sentences: [
            (
                "Physicists at the accelerator saw {} decay into two photons",
                "In the particle collider, {} broke up into a pair of light quanta",
            ),
            (
                "According to general relativity, {} bends the path of light",
                "Einstein's theory says that rays are deflected by {}",
            ),
        ],
        things: [
            ("the Higgs boson", "the boson named after Higgs"),
            ("a neutral pion", "a pion without charge"),
            ("a black hole", "a collapsed star from which nothing escapes"),
            ("dark matter", "invisible dark matter"),
            ("positronium", "the bound state of an electron and a positron"),
        ],
    },
    Subject {
        sentences: [
            (
                "In 1645 the besieged garrison surrendered {} to the Swedish cavalry",
                "The defenders gave up {} to horsemen from Sweden during the Thirty Years' War",
            ),
            (
                "Peasants stormed {} when the bishop doubled the tithe",
                "The doubling of the church tax drove farmers to attack {}",
            ),
        ],
        things: [
            ("the fortress on the Danube", "the stronghold by the Danube"),
            ("the cathedral city", "the town of the cathedral"),
            ("the toll bridge", "the bridge where a fee was due"),
            ("the silver mine", "the pit from which silver came"),
            ("the royal granary", "the king's store of grain"),
        ],
    },
    Subject {
        sentences: [
            (
                "The air traffic controller told {} to hold above the fog and burn off fuel",
                "Because of mist, the tower made {} circle and use up kerosene",
            ),
            (
                "Investigators found that ice on the wings brought down {}",
                "Frozen wings caused the crash of {}, the accident report states",
            ),
        ],
        things: [
            ("the cargo plane from Lima", "the freight aircraft out of Lima"),
            ("the seaplane", "the aeroplane that lands on water"),
            ("the rescue helicopter", "the helicopter on its lifesaving mission"),
            ("the president's jet", "the jet with the head of state aboard"),
            ("the crop duster", "the plane that dusts crops"),
        ],
    },
    Subject {
        sentences: [
            (
                "The shepherds drove {} over the pass before the first snow of October",
                "Ahead of early autumn blizzards, herders moved {} across the mountains",
            ),
            (
                "A foot-and-mouth outbreak forced the farm to slaughter {}",
                "Because of the contagious livestock disease, {} had to be put down by the farmer",
            ),
        ],
        things: [
            ("six hundred sheep", "a flock of several hundred sheep"),
            ("the dairy cows", "the cows that give milk"),
            ("the goats with their kids", "mother goats and their young"),
            ("a herd of yaks", "the shaggy yaks"),
            ("the breeding pigs", "the sows and boars"),
        ],
    },
    Subject {
        sentences: [
            (
                "The philosopher doubted {} and concluded that only the thinking self is certain",
                "Nothing but one's own mind is sure, wrote the thinker, who questioned {}",
            ),
            (
                "Psychologists showed that {} fades when people are deprived of sleep",
                "Subjects kept awake for days lose {}, experiments on the mind reveal",
            ),
        ],
        things: [
            ("free will", "the freedom to choose one's actions"),
            ("the sense of time", "the feeling for how time passes"),
            ("the memory of childhood", "recollections of early years"),
            ("moral judgement", "judging morally what is right"),
            ("the perception of colour", "seeing colours"),
        ],
    },
];
