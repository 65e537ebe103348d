"""The sentence frames and the values of the demonstration's task; make_task.py combines them.

The two splits share no frame, and no word of a name, item, service or city.
"""

FRAMES = {
    "train": {
        "order": """
            {name} from {city} orders {quantity} {item}.
            Please send {quantity} {item} to {name} in {city}.
            {quantity} {item} for {name}, {city}
            Hi, this is {name}. I need {quantity} {item} delivered to {city}.
            New order: {item} x {quantity}, ship to {city}, customer {name}
            I would like {quantity} {item}. My name is {name} and I live in {city}.
            Ship {item} ({quantity} pcs) to {city}, attention {name}.
            Customer {name} wants {quantity} {item}, delivery to {city}.
            To {city}: {quantity} {item}. Buyer: {name}.
            Could you post {quantity} {item} to {city}? Thanks, {name}
            {name} bought {quantity} {item}; destination {city}.
            {city} branch: {name} asks for {quantity} {item}.
            Order by {name}: {quantity} {item}, address in {city}.
            We are out of {item}. Send {quantity} to our shop in {city}. {name}
            {name} here, {city}. Put me down for {quantity} {item}.
            {item}, {quantity} of them, for {name} of {city}.
            Get {name} {quantity} {item} before Monday. City is {city}.
            From: {name}. To: {city}. Content: {quantity} {item}.
            A parcel with {quantity} {item} goes to {name} in {city}.
            Deliver to {city}: {item}, {quantity} units, for {name}.
            Our client {name} ({city}) needs {quantity} {item}.
            {quantity} units of {item}, buyer {name}, city {city}
            Hello from {city}! May I have {quantity} {item}? Regards, {name}
            {name} would take {quantity} {item} if you ship to {city}.
            Web shop: {name}, {city}, {item}, {quantity}
            In {city}, {name} is waiting for {quantity} {item}.
            Add {quantity} {item} to the basket of {name}, {city}.
            Purchase of {item}: {quantity}. Name: {name}. Place: {city}.
            Dear team, {quantity} {item} please. {name}, {city}
            {name} phoned from {city} and ordered {quantity} {item}.
            Reserve {quantity} {item} for {name}; pick-up in {city}.
            The {city} office, through {name}, orders {quantity} {item}.
        """,
        "booking": """
            Table for {guests} in {city} on {day} at {time}, name {name}.
            {name} books a table in {city}, {day}, {time}, {guests} people.
            Please reserve {day} at {time} for {guests} guests in {city}. {name}
            Hi, {name} here. Can we come to {city} on {day}, {time}? We are {guests}.
            {city}, {day}, {time}: {guests} seats for {name}
            Booking for {name}: {guests} persons, {city}, {day} at {time}.
            I want a room in {city} from {day}, arriving {time}, {guests} guests. {name}
            {guests} guests of {name} arrive in {city} at {time} on {day}.
            On {day} at {time} {name} needs {guests} places in {city}.
            Reservation: {time}, {day}, {city}, party of {guests}, {name}
            My name is {name}. A dinner in {city} for {guests}, {day}, {time}.
            We will be {guests} in {city}, {day} {time}. Under {name}, please.
            {name} confirmed {day}, {time}, for {guests} people in {city}.
            At {time} on {day} there will be {guests} of us in {city}, says {name}.
            Lunch in {city}: {name}, {guests} people, {day}, {time}
            Could {name} have {guests} seats at {time}, {day}, in {city}?
            Hold {guests} chairs for {name} at our {city} place, {day}, {time}.
            {day}: {name} comes to {city} with a group of {guests} at {time}.
            For {guests}: {city}, {day}, {time}. Contact is {name}.
            The {city} tour on {day} starts {time}; {name} brings {guests} people.
            Guest {name}, count {guests}, city {city}, day {day}, time {time}
            {name} would like to visit {city} on {day} at {time} with {guests} people.
            Meeting room in {city}, {guests} people, {time} on {day}, host {name}.
            Dear hotel, {guests} guests on {day} in {city}, check-in {time}. Yours, {name}
            {time} in {city}, {day}, for {name} and company, {guests} in all.
            Save {day} for {name}: {guests} persons at {time} in {city}.
            Book {city} for {guests}. Day {day}, hour {time}, name {name}.
            This is {name} calling from {city}: table at {time} on {day} for {guests}.
            {guests} people, {time}, {day}; {name}; {city}
            In {city} we expect {name} with {guests} guests on {day}, {time}.
            New reservation in {city} by {name} for {day} {time}, {guests} pax.
            Tickets for {guests}: {name}, {day}, {time}, {city} theatre.
        """,
        "log": """
            {level} {service} in {city}: code {code}
            [{level}] {city} {service} failed with {code}
            {service} reports {level} {code} at site {city}.
            {city}: {level} from {service}, code={code}
            code {code} {level} service={service} region={city}
            At {city} the service {service} returned {code} ({level}).
            {level}: {service} exit {code}, node in {city}
            {service}@{city} {level} {code}
            site={city} level={level} svc={service} code={code}
            Service {service} ({city}) wrote {level}, status {code}.
            {level} {code} {service} {city}
            Data centre {city}: {service} stopped, {level}, code {code}.
            {code} | {level} | {service} | {city}
            <{level}> {service}: response {code} from {city}
            The {city} host logged {level} {code} for {service}.
            {service} -> {code} [{level}] ({city})
            monitor: {city}/{service} is {level}, last code {code}
            {level} at {city}, process {service}, result {code}
            Got {code} from {service} in {city}, level {level}.
            job {service} ended: {code}. Severity {level}. Location {city}.
            {city} {level} {code}: {service} did not answer
            {service} raised {level} number {code} in {city}
            status {code} for {service}; {level}; {city}
            {level}, {city}, {service}, {code}
            retrying {service} after {code} in {city} [{level}]
            {city} cluster: {level} in {service}, error number {code}
            {service}: {level}: {code}: {city}
            daemon {service} on {city} rack says {level} {code}
            ({city}) {service} code:{code} severity:{level}
            Alert {level}: {city} lost {service}, code {code}.
            {code} seen in {service} logs, {city}, as {level}
            {service} restarted in {city}; cause {code}; {level}
        """,
    },
    "heldout": {
        "order": """
            {name} requests {quantity} {item} for the {city} store.
            Send to {city}, to {name}: {quantity} {item}.
            Hello, {quantity} {item} to {city} please, {name} pays.
            {item}: {quantity}. Recipient: {name}, {city}.
            We at {city} want {quantity} {item}, signed {name}.
            {name} in {city} is buying {quantity} {item} today.
            Pack {quantity} {item} and mail them to {name}, {city}.
            The customer is {name}, the city {city}, the goods {quantity} {item}.
            Good morning, {name} speaking. {quantity} {item} for {city}, please.
            Order received: {quantity} {item}, {city}, {name}
            Bring {name} in {city} another {quantity} {item}.
            {city} needs {quantity} {item}. Ask for {name}.
            Invoice {name} for {quantity} {item} sent to {city}.
            How fast can {quantity} {item} reach {city}? Yours, {name}
            {name}, resident of {city}, ordered {item}, {quantity} pieces.
            Express to {city}: {quantity} {item}, receiver {name}
        """,
        "booking": """
            {name} wants a table for {guests} people in {city}, {day} at {time}.
            Room for {guests} people in {city}, {day}, {time}; the name is {name}.
            Hello, we are {guests} people and come to {city} on {day} at {time}. {name}
            {day}, {time}, {city}: {name} and friends, {guests} people.
            Can you seat {guests} people on {day} at {time} in {city}? Name: {name}.
            Visit to {city} by {name}, {guests} guests, {time}, {day}
            {name} has reserved {guests} seats in {city} for {day}, {time}.
            Breakfast in {city} at {time} on {day} for {guests} people, booked by {name}.
            Put {name} in the book: {city}, {guests} guests, {day}, {time}.
            A party of {guests} under {name} arrives on {day} at {time} in {city}.
            {city} on {day}: {guests} people at {time}, ask for {name}.
            Our host {name} expects {guests} people in {city}, {day}, {time}.
            Reserve for {name}, {city}, {time}, {day}, {guests} guests.
            Event in {city}, {day} {time}, {guests} visitors, organiser {name}
            I am {name}; keep {guests} places free in {city} at {time}, {day}.
            From {time} on {day}, {guests} guests with {name} in {city}.
        """,
        "log": """
            {level} {city} {service} code {code}
            {service} gave {code} in {city}, {level}
            [{city}] {level} {service} returned {code}
            level={level} city={city} service={service} status={code}
            {level} | {service} | {city} | {code}
            Service {service} at {city} has {level} with code {code}.
            {city} server: {service} crashed, {code}, {level}
            {level} - {service} - {code} - {city}
            {service} in {city} answered {code}: {level}
            error number {code} from {service}, {city}, severity {level}
            {level}! {service} is down in {city}, code {code}
            In {city} {service} hit {code}, logged as {level}.
            {city}: {service}: {code} {level}
            {service} [{level}] site {city} result {code}
            {level} {code} on {service}, seen near {city}
            {level}: {service}, {city}, finished with {code}
        """,
    },
}

# A frame's field takes one of the values, which are separated by bars or by spaces.
VALUES = {
    "train": {
        "first": """
            Anna Boris Clara David Elena Farid Greta Hugo Ines Jonas Karim Laura Marco Nadia
            Oscar Petra Quentin Rosa Stefan Tara Umar Vera Walter Xenia Yusuf Zoe Amir Bella
            Carlos Dina Emil Fiona Gareth Hannah Ivan Julia Kevin Lena Miguel Nora Olga Pablo
            Rachel Teresa Victor Wendy Yara Zain Robert John Mary Paul Mark Luke James Thomas
            George William Charles Edward Richard Michael Daniel Matthew Andrew Joseph Samuel
            Jacob Fred Sam Tom Tim Jim Bob Bill Ben Dan Alex Chris Elizabeth Ali Maya Ken Lily
            Jeff Greg Eric Steve Brian Kate Emma Helen Lucy Grace Martha Ruth Linda Susan Karen
            Nancy Lisa Amy Diana Albert Oliver Leo Ryan Kyle Juan Omar Ravi Mei Wei Eva Ada Ivy
            Claire Alan Gary Harry Hans Karl Ellen Donna Julie Joan
        """,
        "last": """
            Abbott Berger Castro Dubois Eriksen Fischer Garcia Hoffman Ibrahim Jansen Kowalski
            Lopez Meyer Novak Olsen Petrov Quinn Rossi Schmidt Tanaka Ueda Vargas Weber Xu
            Yilmaz Zimmer Anders Brandt Cohen Diaz Evans Ferrari Gupta Horvat Iversen Jones
            Keller Larsen Moreau Nguyen Okafor Parker Ramos Silva Hill Urban Smith Brown Miller
            Davis Wilson Moore Taylor White Harris Martin Clark Lewis Young King Wright Green
            Baker
        """,
        "item": """
            desk lamps | wool socks | coffee mugs | garden chairs | steel bolts |
            paint rollers | cotton coats | glass jars | paper boxes | leather belts |
            wax pencils | bicycle pumps | tea towels | rubber gloves | scented candles |
            phone cases | kitchen knives | water bottles | pocket notebooks | door handles |
            wooden spoons | spare batteries | rain hats | tennis balls | picture frames |
            soft pillows | light bulbs | copper pipes | flower pots | baking pans |
            gaming headphones | sun hats | canvas backpacks | claw hammers | brass screws |
            laser printers | alarm clocks | plastic buckets | warm blankets | wall mirrors |
            power cables | corner sofas | soap bars | rice cookers | winter boots |
            silk carpets | beach tents | silver rings | model trains | folding ladders |
            bike helmets | padded envelopes | lace curtains | nail scissors | oak shelves |
            hand drills | red buttons | white sheets | blue keys | small doors |
            large windows | heavy wheels | round cushions | yellow flags | office phones |
            cat baskets | spring flowers | travel guides | writing desks | video screens |
            gold medals | used computers | cheap tablets | film cameras | car tires |
            toy boats | hotel bells | marching drums | curtain rods | ceiling fans |
            heat sensors | network switches | hair ribbons | sewing needles | contact lenses |
            oil paintings | movie posters | rare stamps | party dresses | ski jackets |
            long pants | knitted sweaters | fresh oranges | ripe bananas | sour lemons |
            sweet grapes | canned tomatoes | new potatoes | red onions | frozen carrots |
            brown eggs | salted nuts | ginger cookies | birthday cakes | frozen pies |
            fruit snacks | clay tiles | plum trees | farm tools | grass seeds | bow strings |
            gate locks | cake forks | tin cups | dance shoes | sports watches |
            electric motors | old engines | carpet nails | fence wires
        """,
        "service": """
            billing search login upload checkout inventory backup mailer router cache scheduler
            payments auth catalog indexer gateway reports chat shipping profile thumbnail
            exporter crawler notifier ledger metrics quota-api user-db image-proxy tax-engine
            event-bus job-runner feed-sync geo-lookup token-store web-front client storage
            session account email queue stream audio photo location contact chart table filter
            parser render layout theme settings policy update download import print scan sensor
            network bridge switch logger counter clock signal trigger loader builder agent cart
            pricing discount payroll blog news
        """,
        "city": """
            Berlin | Athens | Oslo | Budapest | Tokyo | Seoul | Delhi | Lima | Nairobi |
            Lagos | Hamburg | Lyon | Porto | Seville | Leeds | Geneva | Turin | Ghent | Riga |
            Perth | Austin | Osaka | Manila | Brussels | Naples | Stockholm | Istanbul |
            Mumbai | Valencia | York | Edinburgh | Cardiff | Copenhagen | Cologne | Miami |
            Detroit | Memphis | Cleveland | Philadelphia | Auckland | Wellington | Vancouver |
            Calgary | Halifax | Quebec | Singapore | Beijing | Moscow | Kiev | Jerusalem |
            Damascus | Colombo | Accra | Durban | Victoria | Richmond | Columbus | Charlotte |
            Salem | Omaha | Tampa | Newark | Bath | Derby | Norwich | Dover | Chester | Nice |
            Cork | Bonn | Basel | Doha | Muscat | Amman | Rabat | Algiers | Panama | Recife |
            Busan | Pune | Surat | Lisbon | Prague | Dublin | Warsaw | Sydney | Bogota |
            Krakow | Sofia | Zagreb | Munich | Helsinki | Zurich | Dallas | Vienna | Madrid |
            Cairo | Glasgow | Montreal | Venice | Orlando | Portland | Melbourne | Amsterdam |
            Frankfurt | New York | San Diego | Cape Town | Hong Kong | Buenos Aires |
            Tel Aviv
        """,
    },
    "heldout": {
        "first": """
            Simon Alice Leon Henry Max Emily Jane Rose Frank Carl Louis Nick Maria Arthur Scott
            Neil Jack Sarah Peter Adam
        """,
        "last": """
            Archer Bianchi Collins Dvorak Engel Fontaine Gruber Hansen Ivanov Jensen Kaufman
            Lindberg Mancini Norris Ortega Peters Reyes Sato Turner Walsh
        """,
        "item": """
            fishing nets | music books | mouse pads | baby beds | dog collars | stone bowls |
            wine glasses | dry beans | world maps | metal coins | black skirts | iron stoves |
            school bags | gift cards | horse brushes | summer shirts | square tables |
            floor mats | running shorts | air filters
        """,
        "service": """
            archive weather ranking calendar wiki robot forum license compiler timer review
            tracker translator recommender history voting
        """,
        "city": """
            London Oxford Boston Chicago Paris Rome Washington Cambridge Lincoln Jackson Madison
            Bern Toronto Denver Seattle Milan
        """,
    },
}
LEVELS = ("ERROR", "WARN", "FATAL", "INFO")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
